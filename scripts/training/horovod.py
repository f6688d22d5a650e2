"""The strategies of a job under Horovod: its own optimizer, ours, and its own with our compression."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any, Iterator

import torch
from torch import Tensor, nn

from . import launch, optimizers, strategies


class StockDense(strategies.Strategy):
    """`hvd.DistributedOptimizer` as it is: the baseline."""

    def __init__(self, model: nn.Module, options: Any, world: launch.World, steps_per_epoch: int) -> None:
        self.model, self.options, self.world = model, options, world
        self._clip_norm = options.clip_norm if options.scheme == "dense" else None  # a memory clips by itself
        wrapped = self._wrap(model, options, steps_per_epoch)
        self.wrapped, self.optimizer = wrapped, View(wrapped)
        numel = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        self._bytes = 2 * (world.size - 1) * numel / world.size  # the formula of a ring all-reduce

    def _wrap(self, model: nn.Module, options: Any, steps_per_epoch: int) -> Any:
        import horovod.torch as hvd

        optimizer = optimizers.make(model, options)
        return hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())

    def step(self, compute: strategies.Compute) -> Tensor:
        self.wrapped.zero_grad()
        loss = compute(self.model)
        loss.backward()
        if self._clip_norm is None:
            self.wrapped.step()
            return loss.detach()
        self.wrapped.synchronize()
        strategies.clip(self.model, self._clip_norm)
        with self.wrapped.skip_synchronize():
            self.wrapped.step()
        return loss.detach()

    def info(self) -> strategies.StepInfo:
        return strategies.StepInfo(self._bytes, self._bytes)


class Sparse(StockDense):
    """`commhooks.horovod.DistributedOptimizer` with the same state as train.py's hook."""

    def _wrap(self, model: nn.Module, options: Any, steps_per_epoch: int) -> Any:
        from commhooks.horovod import DistributedOptimizer

        optimizer = optimizers.make(model, options, in_memory=options.momentum_in == "memory")
        return DistributedOptimizer(
            optimizer,
            model.named_parameters(),
            state=strategies.sparse_state(options, steps_per_epoch, optimizer),
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
        optimizer = optimizers.make(model, options, in_memory=options.momentum_in == "memory")
        selector, _, memory = strategies.scheme_parts(options, steps_per_epoch, optimizer)
        assert selector is not None  # a sparse scheme has one
        extra = {"seed": options.seed} if options.scheme == "randomk" else {}
        make = getattr(Compression, options.scheme)
        self.compression = make(
            selector.schedule,
            model.named_parameters(),
            memory=memory,
            timeout_s=options.timeout,
            **extra,
        )
        return hvd.DistributedOptimizer(
            optimizer,
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
    strategies.STRATEGIES.update(dict.fromkeys(strategies.SPARSE, sparse), dense=StockDense)
