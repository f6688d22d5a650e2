"""How local gradients become one update on all ranks: the seam between the training loop and what is tried out.

The loop hands a strategy a way to compute the loss, and the strategy does the rest of the step. DDP with and without a
communication hook are here; periodic averaging or another framework's optimizer need one class each and an entry in
`STRATEGIES`.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Callable, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from commhooks import ErrorFeedback, ExponentialWarmup, LowBit, NoMemory, SparseState, register, schemes
from commhooks.exchange import Aggregator
from commhooks.memory import Memory
from commhooks.selection.selectors import Selector

from . import optimizers
from .launch import World

SCHEMES = tuple(schemes.SCHEMES)
SPARSE = tuple(name for name in SCHEMES if name != "dense")
Compute = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class StepInfo:
    """Figures of one step on this rank; None: not known."""

    bytes_sent: float
    bytes_received: float
    delta: float | None = None
    residual_norm: float | None = None


class Strategy(ABC):
    """Turns losses into updates.

    Attributes:
        model: what is to be called for a forward pass.
        optimizer: what is stepped, for the learning rate and the checkpoint.
        replicated: parameters and optimizer state are the same on all ranks between steps, so one copy is saved.
    """

    replicated: ClassVar[bool] = True
    model: nn.Module
    optimizer: torch.optim.Optimizer

    @abstractmethod
    def step(self, compute: Compute) -> Tensor:
        """One step; `compute(model)` gives the loss of this rank's batch. Returns it without its graph."""

    @abstractmethod
    def info(self) -> StepInfo:
        """Figures of the last step."""

    def evaluating(self) -> AbstractContextManager[Any]:
        """While it lasts, the model holds what is to be evaluated, the same on all ranks."""
        return nullcontext()

    def prime(self, compute: Compute) -> None:
        """Brings a fresh wrapper to the layout it has after a few steps; before any state is loaded."""

    def state_dict(self) -> dict[str, Any]:
        """What this rank has to keep beside model and optimizer."""
        return {}

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """This rank's own state in a list of one, or all ranks' of a run with another world size."""

    def close(self) -> None:
        """Before the process group goes."""


class DDP(Strategy):
    """Plain `DistributedDataParallel`: the baseline."""

    def __init__(self, model: nn.Module, options: Any, world: World, steps_per_epoch: int) -> None:
        self.optimizer = optimizers.make(model, options)
        self.model = wrap(model, options, world)
        self._clip_norm = options.clip_norm
        bytes_a_step = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        # nothing counts inside DDP: the formula of a ring all-reduce
        self._bytes = 2 * (world.size - 1) * bytes_a_step / world.size

    def step(self, compute: Compute) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = compute(self.model)
        loss.backward()
        clip(self.model, self._clip_norm)
        self.optimizer.step()
        return loss.detach()

    def info(self) -> StepInfo:
        return StepInfo(self._bytes, self._bytes)

    def prime(self, compute: Compute) -> None:
        prime(self.model, self.optimizer, compute, nullcontext)


class Sparse(DDP):
    """DDP with the sparse hook."""

    def __init__(self, model: nn.Module, options: Any, world: World, steps_per_epoch: int) -> None:
        self.optimizer = optimizers.make(model, options, in_memory=options.momentum_in == "memory")
        self.model = wrap(model, options, world)
        self._clip_norm = None  # the memory clips
        self.state = sparse_state(options, steps_per_epoch, self.optimizer)
        self._delta_every = options.delta_every
        register(self.model, self.state)

    def info(self) -> StepInfo:
        stats = self.state.stats()
        measured = self._delta_every > 0 and (stats["step"] - 1) % self._delta_every == 0
        delta = stats["delta"] if measured else None
        return StepInfo(stats["bytes_sent"], stats["bytes_received"], delta, stats["residual_norm"])

    def prime(self, compute: Compute) -> None:
        prime(self.model, self.optimizer, compute, self.state.passthrough)

    def state_dict(self) -> dict[str, Any]:
        return self.state.state_dict()

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        self.state.load_state_dict(states[0] if len(states) == 1 else states)

    def close(self) -> None:
        self.state.close()


def prime(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    compute: Compute,
    passthrough: Callable[[], AbstractContextManager[Any]],
) -> None:
    """Brings a fresh DDP to the bucket layout it has after a few steps; its hook passes gradients through."""
    with passthrough():
        compute(model).backward()
        compute(model)  # DDP lays its buckets anew at the forward pass after the first backward pass
    optimizer.zero_grad(set_to_none=True)


def clip(model: nn.Module, norm: float | None) -> None:
    """Scales all gradients of the model so that their L2 norm is at most `norm`; None: leaves them."""
    if norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), norm)


def wrap(model: nn.Module, options: Any, world: World, sync_buffers: bool = True) -> DistributedDataParallel:
    """The model under DDP, with the bucket size of the options; without `sync_buffers` buffers stay local."""
    places = None if world.device.type == "cpu" else [world.device.index]
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # torch < 2.13
    more: dict[str, Any] = {} if sync_buffers else {name: False}
    return DistributedDataParallel(model, device_ids=places, bucket_cap_mb=options.bucket_mb, **more)


def scheme_parts(
    options: Any, steps_per_epoch: int, optimizer: torch.optim.Optimizer | None = None
) -> tuple[Selector | None, Aggregator, Memory]:
    """What the options describe; `optimizer` is what `--rescale-with-lr` reads the rate of.

    Raises:
        ValueError: an unknown scheme, or values that the library refuses.
    """
    density: Any = options.density
    if options.warmup > 0:
        density = ExponentialWarmup(
            options.density,
            warmup_epochs=options.warmup,
            steps_per_epoch=steps_per_epoch,
            start=options.warmup_start,
        )
    elif options.warmup_steps > 0:
        density = ExponentialWarmup(options.density, options.warmup_steps, start=options.warmup_start)
    memory: Memory = NoMemory()
    if options.error_feedback:
        moves = options.optimizer == "sgd" and options.momentum_in == "memory"
        memory = ErrorFeedback(
            momentum=options.momentum if moves else 0.0,
            nesterov=moves and options.nesterov,
            weight_decay=options.weight_decay if moves else 0.0,
            factor_masking=options.factor_masking,
            clip_norm=options.clip_norm,
            rescale_with_lr=optimizer if options.rescale_with_lr else None,
        )
    parts = schemes.make_parts(options.scheme, density, options.transport, seed=options.seed, memory=memory)
    if options.scheme != "lowbit":
        return parts
    return None, LowBit(options.bits, options.transport), memory


def sparse_state(
    options: Any, steps_per_epoch: int, optimizer: torch.optim.Optimizer | None = None
) -> SparseState:
    """The hook's state that the options describe; arguments and errors as :func:`scheme_parts`."""
    return SparseState(
        *scheme_parts(options, steps_per_epoch, optimizer),
        dense_crossover=options.dense_crossover,
        delta_every=options.delta_every,
        timeout_s=options.timeout,
    )


STRATEGIES: dict[str, Callable[[nn.Module, Any, World, int], Strategy]] = {
    "dense": DDP,
    **dict.fromkeys(SPARSE, Sparse),
}
