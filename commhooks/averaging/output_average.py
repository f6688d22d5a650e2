"""Weighted averages of the iterates: the convex theorems hold for these, not for the last model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import says_what_to_write
from ..transports import Transport
from .averager import Averager
from .buffers import Buffers, average_exactly
from .channel import TAG, reporting
from .flat import Parameters, real_view, tensors_of, unflatten_
from .sync_sets import positive_int

_TAG = TAG + 20
_PIECE = 1 << 15  # elements that are converted to float64 at a time


class Weights(Protocol):
    """Gives the weight of iterate t, from 0."""

    def __call__(self, step: int) -> float: ...


@dataclass(frozen=True)
class Quadratic:
    """``w_t = (shift + t)**2`` (Local SGD, arXiv:1805.09767, Theorem 2.2, whose a is ``shift``)."""

    shift: float

    def __post_init__(self) -> None:
        if not 0.0 < self.shift < math.inf:
            raise ValueError(f"shift must be positive and finite, got {self.shift!r}")

    def __call__(self, step: int) -> float:
        return (self.shift + step) ** 2


@dataclass(frozen=True)
class Uniform:
    """``w_t = 1``: all iterates alike (the stages of stagewise M-DSGD)."""

    def __call__(self, step: int) -> float:
        return 1.0


@dataclass(frozen=True)
class LastHalf:
    """Weight 1 for the last ``ceil(T / 2)`` of ``T = total_steps`` iterates, else 0.

    Source: M-DSGD, arXiv:1905.12960, Theorem 8.
    """

    total_steps: int

    def __post_init__(self) -> None:
        positive_int("total_steps", self.total_steps)

    def __call__(self, step: int) -> float:
        return 1.0 if step >= self.total_steps - math.ceil(self.total_steps / 2) else 0.0


class OutputAverage:
    """``x^ = sum_t w_t x_t / sum_t w_t`` over the iterates t = 0..T-1, and over the workers at the end.

    Call :meth:`update` *before* each optimizer step. The theorems sum over the points where gradients were
    taken: the start is one of them, the last iterate is not.

    Args:
        params: the model, or its parameters, kept by reference. A model's parameters are looked up at each
            update, so ``load_state_dict(..., assign=True)`` may replace them.
        weights: of iterate t, from 0: :class:`Quadratic`, :class:`Uniform`, :class:`LastHalf` or any
            callable.

    Example::

        output = OutputAverage(model, Quadratic(shift=a))
        for x, y in loader:
            ...
            output.update()
            optimizer.step()
            averager.average_parameters(model.parameters())
        with output.applied(averager, batches=loader):
            evaluate(model)
    """

    @says_what_to_write
    def __init__(self, params: torch.nn.Module | Parameters, weights: Weights) -> None:
        self.module = params if isinstance(params, torch.nn.Module) else None
        self._given = [] if isinstance(params, torch.nn.Module) else tensors_of(params)
        self.weights = weights
        self.step = 0
        self.total_weight = 0.0
        self._sums: list[Tensor | None] = []
        self._make_sums()

    @property
    def tensors(self) -> list[Tensor]:
        """The averaged parameters, which require a gradient now or did so at an earlier update."""
        return [t for t, total in zip(self._all(), self._sums, strict=True) if total is not None]

    @property
    def mean(self) -> Tensor:
        """``(n,)`` float64: the running weighted mean of this worker's iterates, zeros before the first."""
        sums = [total for total in self._sums if total is not None]
        return torch.cat([total.reshape(-1) for total in sums]) / (self.total_weight or 1.0)

    def _all(self) -> list[Tensor]:
        return self._given if self.module is None else tensors_of(self.module.parameters())

    def _make_sums(self) -> None:
        """Makes the sums of parameters that require a gradient now and have none yet.

        Such a parameter has not moved so far, so all its iterates equal its present value.
        """
        tensors = self._all()
        self._sums += [None] * (len(tensors) - len(self._sums))
        for i, tensor in enumerate(tensors):
            if self._sums[i] is None and tensor.requires_grad:
                self._sums[i] = real_view(tensor).double() * self.total_weight

    def update(self) -> None:
        """Adds the present parameters to the average, as iterate ``step``.

        Raises:
            ValueError: the weight is negative or not finite.
        """
        weight = float(self.weights(self.step))
        if not 0.0 <= weight < math.inf:
            raise ValueError(f"the weight of step {self.step} must be at least 0 and finite, got {weight!r}")
        self._make_sums()
        self.step += 1
        if weight == 0.0:
            return
        self.total_weight += weight
        for tensor, total in zip(self._all(), self._sums, strict=True):
            if total is not None:
                _add_scaled(total, real_view(tensor), weight)

    def result(self, over: Transport | Averager | None = None) -> Tensor:
        """Returns the average, ``(n,)`` float64.

        Args:
            over: an averager or a transport: average over all its workers too, a collective call. An
                averager's ``weight``, where it has one, is the worker's weight. Workers of a transport count
                alike. None: this worker alone.

        Raises:
            ValueError: no iterate with a positive weight was taken in.
        """
        if self.total_weight == 0.0:
            raise ValueError(
                "no iterate with a positive weight yet: call update() before each optimizer step"
            )
        mean = self.mean
        if over is None:
            return mean
        share = float(getattr(over, "weight", 1.0))
        sent = torch.cat((mean * share, mean.new_tensor([share])))
        transport = over.transport if isinstance(over, Averager) else over
        with reporting(transport):
            transport.all_reduce(sent, tag=_TAG, what="output average")
        return sent[:-1] / sent[-1]

    @contextmanager
    def applied(
        self, over: Transport | Averager | None = None, batches: Iterable[Any] | None = None
    ) -> Iterator[None]:
        """Puts the average into the parameters inside the ``with`` block, and the iterate back after it.

        Args:
            over: as for :meth:`result`.
            batches: this rank's inputs, or tuples that begin with inputs. BatchNorm's statistics belong to
                the last iterate. Inside the block they are computed anew from these inputs (torch's
                ``update_bn``), and averaged over the workers of ``over``.

        Raises:
            ValueError: ``batches`` where not the model but its parameters were given.
        """
        if batches is not None and self.module is None:
            raise ValueError("batches needs OutputAverage(model, ...), got parameters alone")
        tensors = self.tensors
        kept = [t.detach().clone() for t in tensors]
        buffers = [] if self.module is None else list(self.module.buffers())
        kept_buffers = [b.detach().clone() for b in buffers]
        unflatten_(tensors, self.result(over))
        try:
            if batches is not None:
                self._make_statistics(batches, over)
            yield
        finally:
            with torch.no_grad():
                for tensor, old in zip((*tensors, *buffers), (*kept, *kept_buffers), strict=True):
                    tensor.copy_(old)

    def _make_statistics(self, batches: Iterable[Any], over: Transport | Averager | None) -> None:
        assert self.module is not None
        torch.optim.swa_utils.update_bn(batches, self.module)
        if over is None:
            return
        transport = over.transport if isinstance(over, Averager) else over

        def total(flat: Tensor) -> Tensor:
            transport.all_reduce(flat, tag=_TAG, what="output average, statistics")
            return flat

        with reporting(transport):
            buffers = Buffers(self.module, "average").averaged()
            average_exactly(buffers, total, transport.world_size, None, nonfinite=False)

    def state_dict(self) -> dict[str, Any]:
        """Returns the running sum and its counts."""
        sums = [None if total is None else total.clone() for total in self._sums]
        return {"step": self.step, "total_weight": self.total_weight, "sums": sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues a saved average.

        Raises:
            ValueError: the state is for other shapes.
        """
        tensors, sums = self._all(), state["sums"]
        saved = [None if total is None else tuple(total.shape) for total in sums]
        if len(sums) != len(tensors) or any(
            shape not in (None, tuple(real_view(t).shape)) for t, shape in zip(tensors, saved, strict=True)
        ):
            raise ValueError(f"sums must be of {len(tensors)} parameters in their shapes, got {saved}")
        self.step, self.total_weight = state["step"], state["total_weight"]
        self._sums = [
            None if total is None else total.to(tensor.device, copy=True)
            for tensor, total in zip(tensors, sums, strict=True)
        ]


def _add_scaled(total: Tensor, tensor: Tensor, weight: float) -> None:
    """Adds in place: ``total += weight * tensor`` for a float64 total on the tensor's device, in pieces.

    On a CPU torch converts a whole operand of another dtype into a new tensor first, which takes several
    times as long.
    """
    if total.is_contiguous() and tensor.is_contiguous():
        total, tensor = total.view(-1), tensor.view(-1)
    if total.ndim == 0 or total.numel() <= _PIECE or total.device.type != "cpu":
        total.add_(tensor, alpha=weight)
        return
    rows = max(1, _PIECE * total.shape[0] // total.numel())
    for own, given in zip(torch.split(total, rows), torch.split(tensor, rows), strict=True):
        own.add_(given, alpha=weight)
