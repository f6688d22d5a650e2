"""The three routes of a bucket: plain, dense and sparse. Each is one exchange, with the same verbs.

``correct``
    brings gradient and memory together and takes out what is sent; sets ``bad`` to this rank's non-finite
    elements.
``exchange``
    sums over ranks; returns whether any rank found NaN or Inf.
``write``
    overwrites the gradient with the result.
``commit`` or ``rollback``
    end the exchange, when the step counts or when it does not (:class:`~commhooks.reduction.step.Step`).
``take_back``
    instead of ``write``: the memory becomes what it was before ``correct``.

Common attributes:
    buffer: shape ``(n,)``, the gradient.
    context: which exchange this is.
    memory, held: corrects the gradient; the bucket's part of it.
    operands: of the pass that corrects; ``operands.grad`` is the buffer.
    bad: this rank's non-finite elements, and ``where`` they were counted, for messages.
    misses: selections whose sampled guess did not hold.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..exchange import Aggregated, Aggregator
from ..exchange.voting_sum import summed
from ..gradient.sparse_grad import SparseGrad
from ..memory import Memory
from ..memory.parameter_memory import BucketMemory
from ..native.fused import Fused
from ..selection.selectors import Selector
from ..transports import Transport
from ..wire.message import Context
from .stats import DeltaMeter
from .write_back import write_dense, write_sparse


@dataclass(eq=False, slots=True)
class PlainRoute:
    """The buffer itself (float32) is all-reduced, as by DDP without a hook, without memory or vote."""

    buffer: Tensor
    context: Context
    bad: int = field(default=0, init=False)
    misses: int = field(default=0, init=False)
    where: str = field(default="in the sum over ranks", init=False)

    def correct(self) -> None:
        """Nothing: the gradient is sent as it is."""

    def exchange(self, transport: Transport) -> bool:
        """All-reduces the buffer. NaN and Inf of any rank stay in the sum, where all ranks find them."""
        transport.all_reduce(self.buffer, tag=self.context.tag, what=str(self.context))
        if not bool(self.buffer.sum().isfinite()):  # finite elements may have a sum that is not
            self.bad = int((~self.buffer.isfinite()).sum())
        return self.bad > 0

    def take_back(self) -> None:
        """Nothing: there is no memory."""

    def write(self, factor: float, share: float) -> None:
        """The buffer becomes ``factor`` times the sum."""
        self.buffer.mul_(factor)

    def commit(self) -> None:
        """Nothing."""

    def rollback(self) -> None:
        """Nothing."""


@dataclass(eq=False, slots=True)
class DenseRoute:
    """The whole corrected gradient is all-reduced, so that the residual goes along."""

    memory: Memory
    held: BucketMemory
    operands: Fused
    context: Context
    bad: int = field(default=0, init=False)
    misses: int = field(default=0, init=False)
    where: str = field(default="on this rank", init=False)
    _active: Tensor | None = field(default=None, init=False)
    _values: Tensor | None = field(default=None, init=False)
    _rounding: Tensor | None = field(default=None, init=False)

    def correct(self) -> None:
        """Adds the gradient to the residual. A parameter whose gradient is all zero sends nothing."""
        self.bad = self.memory.accumulate(self.operands)
        self._active = self.held.active(self.operands.grad)

    def exchange(self, transport: Transport) -> bool:
        """All-reduces the corrected gradient, with the vote."""
        residual = self.held.residual
        sent = residual if self._active is None else residual * self._active
        self._values, thrown_away = summed(transport, sent, self.bad > 0, self.context)
        return thrown_away

    def take_back(self) -> None:
        """Takes the gradient out of the memory."""
        self.memory.undo(self.held, self.operands)

    def write(self, factor: float, share: float) -> None:
        """The buffer becomes ``factor`` times the sum."""
        assert self._values is not None
        self._rounding = write_dense(self.operands.grad, self._values, factor, share)
        self._values = None

    def commit(self) -> None:
        """Leaves what was not sent in the residual, and what rounding kept. Until here it holds all that was
        sent.
        """
        residual = self.held.residual
        kept = residual.new_zeros(()) if self._active is None else residual * ~self._active
        residual.copy_(kept if self._rounding is None else kept + self._rounding)

    def rollback(self) -> None:
        """Nothing: the residual still holds what was sent."""


@dataclass(eq=False, slots=True)
class SparseRoute:
    """``k`` pairs of the corrected gradient are sent; the rest stays in the residual.

    Attributes:
        selector: chooses the pairs.
        k: places.
        mask_key: tells masks of one step apart: see :meth:`~commhooks.selection.selectors.Selector.select`.
        aggregator: sums the pairs over ranks. None: the caller exchanges ``pairs`` itself and sets ``out``.
        meter: measures Assumption 1's delta; or None.
        pairs: what was selected.
        out: the outcome, from ``exchange`` to ``write``.
    """

    memory: Memory
    held: BucketMemory
    operands: Fused
    context: Context
    selector: Selector
    k: int
    mask_key: int
    aggregator: Aggregator | None = None
    meter: DeltaMeter | None = None
    bad: int = field(default=0, init=False)
    where: str = field(default="on this rank", init=False)
    misses: int = field(default=0, init=False)
    pairs: SparseGrad = field(init=False)
    out: Aggregated | None = field(default=None, init=False)
    _contributed: SparseGrad = field(init=False)
    _rounding: SparseGrad | None = field(default=None, init=False)

    def correct(self) -> None:
        """Adds the gradient to the residual and takes ``pairs`` out of it, in one pass."""
        step, key = self.context.step, self.mask_key
        selected = self.selector.select(self.operands, self.k, step=step, mask_key=key)
        _, self.bad, self.misses, _ = selected.report.tolist()
        self.pairs = self._contributed = SparseGrad(
            selected.values, selected.indices, self.operands.grad.numel()
        )

    def exchange(self, transport: Transport) -> bool:
        """Sums the pairs by the aggregator, which carries the vote."""
        assert self.aggregator is not None
        self.out = out = self.aggregator.aggregate(transport, self.pairs, self.bad > 0, self.context)
        if self.meter is not None and not out.nonfinite:
            self.meter.add(transport, self.held.residual, out, self.k, self.context.tag)
        return out.nonfinite

    def take_back(self) -> None:
        """Puts the pairs back and takes the gradient out of the memory."""
        self.memory.restore(self.held, self.pairs)
        self.memory.undo(self.held, self.operands)

    def write(self, factor: float, share: float, target: Tensor | None = None) -> None:
        """Puts back what was refused; ``target`` (default: the buffer) becomes ``factor`` times the sum."""
        assert self.out is not None
        out, self.out = self.out, None  # the rows of all ranks are not needed until the end of the step
        self._contributed = out.contributed
        if out.refused is not None:
            self.memory.restore(self.held, out.refused)
        into = self.operands.grad if target is None else target
        self._rounding = write_sparse(into, out.values, out.indices, factor, share)

    def commit(self) -> None:
        """Masks the velocity where this rank contributed, and puts back what rounding kept."""
        if self.k < self.operands.grad.numel():
            self.memory.mask_velocity(self.held, self._contributed)
        if self._rounding is not None:
            self.memory.restore(self.held, self._rounding)

    def rollback(self) -> None:
        """Puts back what this rank contributed; before ``write`` that is all of its pairs."""
        self.memory.restore(self.held, self._contributed)


Route = PlainRoute | DenseRoute | SparseRoute
