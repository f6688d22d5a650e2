"""Training that communicates rarely: the averagers of commhooks as strategies of the training loop.

With `--scheme topk` (or another sparse one) the model's change is compressed by it at each averaging; with
`--averaging-start N` gradients are reduced by `--scheme` for N steps and models averaged after them (post-local SGD).
`stagewise` runs DDP with the sparse hook throughout.
"""

from __future__ import annotations

import argparse
from contextlib import contextmanager, nullcontext
from typing import Any, Callable, Iterator

import torch
from torch import Tensor, nn

from commhooks import LowBit, Reducer, SparseState, sparse_hook
from commhooks.averaging import PostLocalState, post_local_hook
from commhooks.transports import make as make_transport

from . import optimizers
from .launch import World
from .schedules import total_steps
from .strategies import Compute, Sparse, StepInfo, Strategy, clip, prime, scheme_parts, sparse_state, wrap

KINDS = ("local", "block", "slowmo", "diloco", "restarted", "decentralized", "stagewise")
WIRED = ("local", "block", "slowmo", "diloco")
WIRE_BITS = (1, 2, 4, 8, 16, 32)
TOPOLOGIES = ("ring", "torus", "hypercube", "exponential", "complete", "one_peer_exponential")
AVERAGING_HELP = (
    "Local SGD, block momentum (M-AVG), SlowMo, DiLoCo, PR-SGD-Momentum, decentralized, "
    "or stagewise M-DSGD (none)."
)
SYNC_SETS = "every (by --period), growing, one-shot, suggested (by the papers), at:10,20,40"
SYNC_HELP = f"Steps after which local and restarted average: {SYNC_SETS} (every)."
START_HELP = "Steps in which --scheme reduces gradients first: post-local SGD (0)."


class Averaged(Strategy):
    """Local steps on the bare model, averaged now and then; or DDP with the post-local hook when it starts late."""

    replicated = False

    def __init__(self, model: nn.Module, options: Any, world: World, steps_per_epoch: int) -> None:
        self.transport = make_transport(options.transport, timeout_s=options.timeout)
        if self.transport.world_size != world.size:
            raise ValueError(
                f"--transport {options.transport} connects {self.transport.world_size} of {world.size} ranks"
            )
        self.optimizer = optimizers.make(model, options)
        # where a sparse hook reduces gradients first, its memory clips them until local steps begin
        self._clip_norm = options.clip_norm
        self.bare, self.model = model, model
        sync = sync_set(options, total_steps(options, steps_per_epoch), world.size)
        self.post_local: PostLocalState | None = None
        self.sparse: SparseState | None = None
        reducer = None
        if options.scheme != "dense" and not options.averaging_start:
            syncs = sum(step in sync for step in range(1, steps_per_epoch + 1))
            plain = _plain(options, self.transport, clip_norm=None)  # a model's change is not clipped
            reducer = Reducer(
                *scheme_parts(plain, max(1, syncs)),
                dense_crossover=options.dense_crossover,
                timeout_s=options.timeout,
            )
        self.averager = make_averager(self, model, options, reducer, sync)
        if options.averaging_start:
            self._reduce_gradients_first(options, world, steps_per_epoch)
        self._info = StepInfo(0.0, 0.0)

    def _reduce_gradients_first(self, options: Any, world: World, steps_per_epoch: int) -> None:
        """Wraps the model: DDP reduces gradients by `--scheme` up to the step at which averaging begins."""
        self.model = wrap(self.bare, options, world, sync_buffers=False)
        inner: tuple[Any, ...] = (None, None)
        if options.scheme != "dense":
            self.sparse = sparse_state(_plain(options, options.transport), steps_per_epoch)
            self.sparse.set_names(self.bare.named_parameters())
            self.sparse.attach(self.model)
            inner = (sparse_hook, self.sparse)
        self.post_local = PostLocalState(options.averaging_start, *inner, averager=self.averager)
        self.model.register_comm_hook(self.post_local, post_local_hook)

    def step(self, compute: Compute) -> Tensor:
        counters = self.transport.counters
        sent, received = counters.bytes_sent, counters.bytes_received
        self.optimizer.zero_grad(set_to_none=True)
        loss = compute(self.model)
        loss.backward()
        if self.sparse is None or (self.post_local is not None and self.post_local.local):
            clip(self.bare, self._clip_norm)
        self.optimizer.step()
        self.averager.average_parameters(self.bare.parameters())
        extra = self._gradient_bytes()
        norm = None if self.averager.reducer is None else self.averager.reducer.stats()["residual_norm"]
        sent, received = counters.bytes_sent - sent, counters.bytes_received - received
        self._info = StepInfo(sent + extra[0], received + extra[1], None, norm)
        return loss.detach()

    def _gradient_bytes(self) -> tuple[float, float]:
        """Bytes of the gradients' reduction in the step just done, before the averaging starts."""
        if self.post_local is None or self.post_local.local:
            return 0.0, 0.0
        if self.sparse is not None:
            stats = self.sparse.stats()
            return stats["bytes_sent"], stats["bytes_received"]
        size = sum(p.numel() * p.element_size() for p in self.bare.parameters() if p.requires_grad)
        ring = 2 * (self.transport.world_size - 1) * size / self.transport.world_size
        return ring, ring

    def info(self) -> StepInfo:
        return self._info

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The ranks' average, parameters and floating buffers; each rank's own come back after it.

        Behind a wire the parameters are the model that all ranks have in common: what a rank withheld is noise.
        Without buffers nothing is sent then.
        """
        from commhooks.averaging import LocalSGD

        buffers, wired = list(self.bare.buffers()), self.averager.wire is not None
        tensors = [*self.bare.parameters(), *buffers]
        kept = [t.detach().clone() for t in tensors]
        if buffers or not wired:
            LocalSGD(1, transport=self.transport, module=self.bare).synchronise(self.bare.parameters())
        with self.averager.common_model() if wired else nullcontext():
            yield
        with torch.no_grad():
            for tensor, old in zip(tensors, kept):
                tensor.copy_(old)

    def prime(self, compute: Compute) -> None:
        if self.post_local is not None:
            prime(
                self.model, self.optimizer, compute, self.sparse.passthrough if self.sparse else nullcontext
            )

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"averager": self.averager.state_dict()}
        if self.post_local is not None:
            state["post_local"] = self.post_local.state_dict()
        return state

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        self.averager.load_state_dict(states[0]["averager"])
        if self.post_local is not None:
            self.post_local.load_state_dict(states[0]["post_local"])

    def close(self) -> None:
        if self.sparse is not None:
            self.sparse.close()
        self.averager.close()


class Staged(Sparse):
    """Stagewise M-DSGD: DDP with the sparse hook, its proximal term in every loss."""

    def __init__(self, model: nn.Module, options: Any, world: World, steps_per_epoch: int) -> None:
        from commhooks.averaging import Stagewise

        super().__init__(model, options, world, steps_per_epoch)
        self.stages = Stagewise(self.optimizer, self.state, gamma=options.gamma, eta0=options.lr)

    def step(self, compute: Compute) -> Tensor:
        self.stages.apply_rate()  # the loop's own schedule does not apply
        loss = super().step(lambda model: compute(model) + self.stages.penalty())
        self.stages.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"hook": super().state_dict(), "stages": self.stages.state_dict()}

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        super().load_state_dict([s["hook"] for s in states])
        self.stages.load_state_dict(states[0]["stages"])


def sync_set(options: Any, total: int, world_size: int) -> Any:
    """After which of the ``total`` steps models are averaged, as `--sync` and `--period` say.

    Raises:
        ValueError: steps after ``at:`` that are no positive integers.
    """
    from commhooks import averaging as a

    kind, _, steps = options.sync.partition(":")
    if kind == "growing":
        return a.Growing(1, options.period, total_steps=total)
    if kind == "one-shot":
        return a.OneShot(total)
    if kind == "at":
        numbers = steps.split(",")
        wrong = [step for step in numbers if not step.strip().isdecimal()]
        if wrong:
            raise ValueError(
                f"steps are whole numbers from 1 with commas between, as at:10,20, got {wrong[0]!r}"
            )
        return a.AtSteps(map(int, numbers))
    period = options.period
    if kind == "suggested" and options.averaging == "restarted":
        period = a.suggest_restart_period(total, world_size)
    elif kind == "suggested":
        period = a.suggest_period(total, world_size, options.batch_size)
    return a.Every(period, start=options.averaging_start)


def make_averager(strategy: Averaged, model: nn.Module, options: Any, reducer: Any, sync: Any) -> Any:
    """The averager that the options describe."""
    from commhooks import averaging as a

    given = {"module": model, "buffers": options.buffers, "reducer": reducer, "transport": strategy.transport}
    if options.wire_bits is not None:
        given["wire"] = LowBit(options.wire_bits)
    makers: dict[str, Callable[[], Any]] = {
        "local": lambda: a.LocalSGD(sync, params=model.parameters(), **given),
        "block": lambda: a.BlockMomentum(options.mu, options.period, params=model.parameters(), **given),
        "slowmo": lambda: a.SlowMo(
            strategy.optimizer, options.mu, options.period, alpha=options.outer_lr, **given
        ),
        "diloco": lambda: a.DiLoCo(
            model.parameters(), outer_optimizer(options), sync_every=options.period, **given
        ),
        "restarted": lambda: a.RestartedMomentum(strategy.optimizer, sync, **given),
        "decentralized": lambda: a.DecentralizedMomentum(
            strategy.optimizer,
            getattr(a.topology, options.topology)(strategy.transport.world_size),
            period=options.period,
            **given,
        ),
    }
    return makers[options.averaging]()


def outer_optimizer(options: Any) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
    """DiLoCo's outer step as the options describe it: SGD with Nesterov's momentum."""

    def make(params: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=options.outer_lr, momentum=options.mu, nesterov=options.mu > 0.0)

    return make


def check(options: Any) -> None:
    """Refuses what could not be meant.

    Raises:
        ValueError: with the option's name and value.
    """
    if options.averaging == "none":
        return
    if options.period < 1:
        raise ValueError(f"--period {options.period} is not positive")
    if not 0.0 <= options.mu < 1.0:
        raise ValueError(f"--mu {options.mu} is outside [0, 1)")
    if not options.outer_lr > 0.0:
        raise ValueError(f"--outer-lr {options.outer_lr} is not positive")
    if options.wire_bits is not None and options.averaging not in WIRED:
        raise ValueError(f"--wire-bits is for {', '.join(WIRED)}, not {options.averaging}")
    if options.wire_bits is not None and options.scheme != "dense":
        raise ValueError(f"--wire-bits and --scheme {options.scheme} are two ways to send the model's change")
    if options.averaging_start < 0:
        raise ValueError(f"--averaging-start {options.averaging_start} is negative")
    if options.averaging_start and options.averaging not in ("local", "restarted"):
        raise ValueError(f"--averaging-start is for local and restarted, not {options.averaging}")
    _check_sync(options)
    if options.nesterov and options.momentum == 0.0:
        raise ValueError("--nesterov needs --momentum")
    if options.averaging == "decentralized" and options.scheme != "dense":
        raise ValueError(
            f"--averaging decentralized sends to neighbours only: --scheme {options.scheme} does not apply"
        )
    if options.averaging in ("restarted", "decentralized", "stagewise") and options.optimizer != "sgd":
        raise ValueError(
            f"--averaging {options.averaging} is SGD's: --optimizer {options.optimizer} does not apply"
        )
    if options.averaging == "stagewise" and options.scheme == "dense":
        raise ValueError("--averaging stagewise runs on a sparse hook: give --scheme topk, for instance")
    if not options.gamma > 0:
        raise ValueError(f"--gamma {options.gamma} is not positive")


def _check_sync(options: Any) -> None:
    kind, colon, _ = options.sync.partition(":")
    if kind not in ("every", "growing", "one-shot", "suggested", "at") or (colon == ":") != (kind == "at"):
        raise ValueError(f"--sync {options.sync} is none of: {SYNC_SETS}")
    if kind != "every" and options.averaging not in ("local", "restarted"):
        raise ValueError(
            f"--sync {options.sync} is for local and restarted: {options.averaging} has a --period"
        )
    if options.averaging_start and kind not in ("every", "suggested"):
        raise ValueError(f"--averaging-start goes with --sync every or suggested, not {options.sync}")
    try:
        sync_set(options, 1, 1)
    except ValueError as error:
        raise ValueError(f"--sync {options.sync}: {error}") from error


def _plain(options: Any, transport: Any, **more: Any) -> argparse.Namespace:
    """The options with this transport, and momentum and weight decay left to the optimizer."""
    own = {
        "transport": transport,
        "momentum": 0.0,
        "momentum_in": "optimizer",
        "factor_masking": False,
        "delta_every": 0,
        **more,
    }
    return argparse.Namespace(**{**vars(options), **own})
