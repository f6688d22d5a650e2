"""The jobs of train.py under Horovod: the same tasks, options, log and checkpoints, another way to exchange gradients.

horovodrun -np 4 --gloo python scripts/train_horovod.py --scheme topk --density 0.01
horovodrun -np 4 --mpi  python scripts/train_horovod.py --scheme gtopk
mpirun -np 4 python -m mpi4py scripts/train_horovod.py --scheme randomk --stock

Options are train.py's (see its --help), and:
  --stock   Horovod's own DistributedOptimizer with commhooks.horovod.Compression (topk and randomk), not ours
Dense is Horovod's own optimizer without compression. The launcher chooses the transport; --bucket-mb sizes our buckets.
"""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.append(str(Path(__file__).resolve().parent.parent))  # an uninstalled checkout will do

import torch
from jobs import launch, strategies
from torch import Tensor, nn


class StockDense(strategies.Strategy):
    """`hvd.DistributedOptimizer` as it is: the baseline."""

    def __init__(self, model: nn.Module, options: Any, world: launch.World, steps_per_epoch: int) -> None:
        self.model, self.options, self.world = model, options, world
        wrapped = self._wrap(model, options, steps_per_epoch)
        self.wrapped, self.optimizer = wrapped, View(wrapped)
        numel = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        self._bytes = 2 * (world.size - 1) * numel / world.size  # the formula of a ring all-reduce

    def _wrap(self, model: nn.Module, options: Any, steps_per_epoch: int) -> Any:
        import horovod.torch as hvd

        sgd = strategies.sgd(model, options, momentum=options.momentum)
        return hvd.DistributedOptimizer(sgd, named_parameters=model.named_parameters())

    def step(self, compute: strategies.Compute) -> Tensor:
        self.wrapped.zero_grad()
        loss = compute(self.model)
        loss.backward()
        self.wrapped.step()
        return loss.detach()

    def info(self) -> strategies.StepInfo:
        return strategies.StepInfo(self._bytes, self._bytes)


class Sparse(StockDense):
    """`commhooks.horovod.DistributedOptimizer` with the same state as train.py's hook."""

    def _wrap(self, model: nn.Module, options: Any, steps_per_epoch: int) -> Any:
        from commhooks.horovod import DistributedOptimizer

        momentum = 0.0 if options.error_feedback else options.momentum
        return DistributedOptimizer(
            strategies.sgd(model, options, momentum=momentum),
            model.named_parameters(),
            state=strategies.sparse_state(options, steps_per_epoch),
            bucket_cap_mb=options.bucket_mb,
        )

    @property
    def _source(self) -> Any:
        return self.wrapped.sparse_state

    def close(self) -> None:
        self.wrapped.close()

    def info(self) -> strategies.StepInfo:
        stats = self._source.stats()
        sent, received = stats["bytes_sent"], stats["bytes_received"]
        return strategies.StepInfo(sent, received, stats.get("delta"), stats["residual_norm"])

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self._source.state_dict()
        return state

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        self._source.load_state_dict(states[0] if len(states) == 1 else states)


class StockSparse(Sparse):
    """`hvd.DistributedOptimizer` with our compression: one argument."""

    def _wrap(self, model: nn.Module, options: Any, steps_per_epoch: int) -> Any:
        import horovod.torch as hvd

        from commhooks.horovod import Compression

        if options.scheme not in ("topk", "randomk") or not options.error_feedback or options.clip_norm:
            raise ValueError(
                "--stock serves --scheme topk and randomk with error feedback, without --clip-norm"
            )
        state = strategies.sparse_state(options, steps_per_epoch)  # for its selector and memory
        reducer = state.reducer
        extra = {"seed": options.seed} if options.scheme == "randomk" else {}
        make = getattr(Compression, options.scheme)
        self.compression = make(
            reducer.selector.schedule,
            model.named_parameters(),
            memory=reducer.memory,
            timeout_s=options.timeout,
            **extra,
        )
        return hvd.DistributedOptimizer(
            strategies.sgd(model, options, momentum=0.0),
            named_parameters=model.named_parameters(),
            compression=self.compression,
        )

    @property
    def _source(self) -> Any:
        return self.compression

    def close(self) -> None:
        """Nothing was opened."""

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        if len(states) != 1:
            raise ValueError("--stock resumes at the number of ranks it was saved at")
        self.compression.load_state_dict(states[0])


class View:
    """The optimizer as the loop sees it: learning rate and torch's own state; residuals go a way of their own."""

    def __init__(self, wrapped: Any) -> None:
        self._wrapped = wrapped

    @property
    def param_groups(self) -> Any:
        return self._wrapped.param_groups

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in self._wrapped.state_dict().items() if name != "commhooks"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._wrapped.load_state_dict(state)


@contextmanager
def session(device: str, timeout_s: float) -> Iterator[launch.World]:
    """Horovod's ranks, and a gloo process group beside it for what the loop does besides gradients."""
    import horovod.torch as hvd

    hvd.init()
    from commhooks.horovod.transport import close_default_group, open_default_group

    place = torch.device(device, hvd.local_rank()) if device == "cuda" else torch.device("cpu")
    kind = "mpi" if hvd.mpi_enabled() else "horovodrun"
    try:
        open_default_group(hvd.global_process_set, timeout_s)
        yield launch.World(hvd.rank(), hvd.size(), kind, place)
    except BaseException as error:
        launch._leave_in_error(kind, error)
    hvd.barrier()  # the first rank to leave shuts Horovod down on all of them
    close_default_group()
    hvd.shutdown()


def use_horovod(stock: bool) -> None:
    """Makes the loop take its strategies from here."""
    sparse = StockSparse if stock else Sparse
    strategies.STRATEGIES.update(dict.fromkeys(strategies.SCHEMES[1:], sparse), dense=StockDense)


def main() -> None:
    """Reads the command line, trains, prints the summary on rank 0."""
    arguments = sys.argv[1:]
    if "-h" in arguments or "--help" in arguments:
        print(__doc__)
        return
    from jobs import loop, options
    from train import render

    stock = "--stock" in arguments
    chosen = options.parse([argument for argument in arguments if argument != "--stock"])
    if getattr(chosen, "averaging", "none") != "none":
        sys.exit("train_horovod.py: error: --averaging is train.py's: periodic averaging needs no Horovod")
    torch.set_num_threads(1)
    with session(chosen.device, timeout_s=max(120.0, 2 * chosen.timeout)) as world:
        use_horovod(stock)
        try:
            run = loop.Run(chosen, world)
        except ValueError as error:
            if not world.is_main:
                time.sleep(1.0)
            print(f"train_horovod.py: error: {error}", file=sys.stderr, flush=True)
            raise SystemExit(2) from error
        summary = run.train()
        if world.is_main:
            print(render(summary), flush=True)
    launch.leave()


if __name__ == "__main__":
    main()
