"""Averages of the iterates, which the convex theorems are about: the output is not the last model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..transports.base import Transport
from .averager import reporting
from .flat import flatten, numel_of, parameters_of, unflatten_
from .sync_sets import positive_int

_TAG = 7020


class Weights(Protocol):
    """Weight of iterate t, from 0."""

    def __call__(self, step: int) -> float: ...


@dataclass(frozen=True)
class Quadratic:
    """``w_t = (shift + t)**2`` (Local SGD, arXiv:1805.09767, Theorem 2.2; ``shift`` is its a)."""

    shift: float

    def __post_init__(self) -> None:
        if not 0.0 < self.shift < math.inf:
            raise ValueError(f"shift must be positive and finite, got {self.shift!r}")

    def __call__(self, step: int) -> float:
        return (self.shift + step) ** 2


@dataclass(frozen=True)
class Uniform:
    """All iterates alike (the stages of stagewise M-DSGD)."""

    def __call__(self, step: int) -> float:
        return 1.0


@dataclass(frozen=True)
class LastHalf:
    """The last ``ceil(T / 2)`` of ``T = total_steps`` iterates (M-DSGD, arXiv:1905.12960, Theorem 8)."""

    total_steps: int

    def __post_init__(self) -> None:
        positive_int("total_steps", self.total_steps)

    def __call__(self, step: int) -> float:
        return 1.0 if step >= self.total_steps - math.ceil(self.total_steps / 2) else 0.0


class OutputAverage:
    """``x^ = sum_t w_t x_t / sum_t w_t`` over the iterates t = 0..T-1, and over the workers at the end.

    Call :meth:`update` *before* each optimizer step: the theorems' sums hold the points where gradients were
    taken, the start among them, and not the last iterate.

    Args:
        params: the parameters; kept by reference.
        weights: of iterate t, from 0; :class:`Quadratic`, :class:`Uniform`, :class:`LastHalf` or any
            callable.

    Example::

        output = OutputAverage(model.parameters(), Quadratic(shift=a))
        for x, y in loader:
            ...
            output.update()
            optimizer.step()
            averager.average_parameters(model.parameters())
        with output.applied(averager.transport):
            evaluate(model)
    """

    def __init__(self, params: Iterable[Tensor], weights: Weights) -> None:
        self.tensors = parameters_of(params)
        self.weights = weights
        self.step = 0
        self.total_weight = 0.0
        self.mean = torch.zeros(numel_of(self.tensors), dtype=torch.float64)
        """``(n,)`` float64 on the CPU: the running weighted mean of this worker's iterates."""

    def update(self) -> None:
        """Takes in the parameters as they are now, as iterate ``step``.

        Raises:
            ValueError: the weight is negative or not finite.
        """
        weight = float(self.weights(self.step))
        if not 0.0 <= weight < math.inf:
            raise ValueError(f"the weight of step {self.step} must be at least 0 and finite, got {weight!r}")
        self.step += 1
        if weight == 0.0:
            return
        self.total_weight += weight
        iterate = flatten(self.tensors, torch.float64).cpu()
        self.mean.add_(iterate.sub_(self.mean), alpha=weight / self.total_weight)

    def result(self, transport: Transport | None = None) -> Tensor:
        """The average, ``(n,)`` float64; with a transport over all workers too (a collective call).

        Raises:
            ValueError: no iterate with a positive weight was taken in.
        """
        if self.total_weight == 0.0:
            raise ValueError(
                "no iterate with a positive weight yet: call update() before each optimizer step"
            )
        mean = self.mean.clone()
        if transport is not None:
            with reporting(transport):
                transport.all_reduce(mean, tag=_TAG, what="output average")
            mean /= transport.world_size
        return mean

    @contextmanager
    def applied(self, transport: Transport | None = None) -> Iterator[None]:
        """Puts the average into the parameters inside the ``with`` block, and the iterate back after it."""
        kept = [t.detach().clone() for t in self.tensors]
        unflatten_(self.tensors, self.result(transport))
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, old in zip(self.tensors, kept, strict=True):
                    tensor.copy_(old)

    def state_dict(self) -> dict[str, Any]:
        """The running mean and its counts."""
        return {"step": self.step, "total_weight": self.total_weight, "mean": self.mean.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues a saved average.

        Raises:
            ValueError: the state is for another number of elements.
        """
        if state["mean"].shape != self.mean.shape:
            raise ValueError(f"mean must have {self.mean.numel()} elements, got {state['mean'].numel()}")
        self.step, self.total_weight = state["step"], state["total_weight"]
        self.mean.copy_(state["mean"])
