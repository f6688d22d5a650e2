"""The four routes of a bucket: plain, dense, low-bit and sparse, with the same methods.

A route is one exchange.

``correct``
    adds the gradient to the memory and takes out what is sent. Sets ``bad``.
``exchange``
    sums over ranks and returns whether any rank found NaN or Inf.
``write``
    overwrites a target, such as the gradient, with ``factor`` times the sum, and tells the memory which
    parameters took part. Rounding errors are divided by ``share`` before they return to the memory
    (``write_back.py``).
``take_back``
    is called instead of ``write`` when the bucket is thrown away. It restores the memory from before
    ``correct``.
``commit`` or ``rollback``
    ends an exchange that was written: ``commit`` when the step counts, ``rollback`` when it does not
    (:class:`~commhooks.reduction.step.Step`).

Common attributes:
    buffer: shape ``(n,)``, the gradient.
    context: which exchange this is.
    memory: corrects the gradient.
    held: the bucket's part of the memory.
    operands: the operands of the fused pass. The memory may have put a copy of the gradient into them.
    bad: the number of non-finite elements.
    where: where they were counted, for messages.
    misses: the number of selections whose sampled guess was wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..exchange import Aggregated, Aggregator, Dense, LowBit
from ..exchange.low_bit import Activity, LowBitMean
from ..exchange.voting_sum import summed
from ..gradient.sparse_grad import SparseGrad, empty_message, places
from ..memory import Memory
from ..memory.owner_memory import OwnedChunk
from ..memory.parameter_memory import BucketMemory
from ..native.fused import Fused, Selected
from ..selection.selectors import Selector
from ..transports import Transport
from ..wire.low_bit import chunks
from ..wire.message import Context
from .stats import DeltaMeter
from .write_back import write_dense, write_sparse


@dataclass(eq=False)
class PlainRoute:
    """All-reduces the float32 buffer itself, without memory or vote, as DDP does without a hook."""

    buffer: Tensor
    context: Context
    bad = misses = 0
    where = "in the sum over ranks"

    def correct(self) -> None:
        """Does nothing: the gradient is sent as it is."""

    def exchange(self, transport: Transport) -> bool:
        """All-reduces the buffer. NaN and Inf of any rank stay in the sum, where all ranks find them."""
        transport.all_reduce(self.buffer, tag=self.context.tag, what=str(self.context))
        if not bool(self.buffer.sum().isfinite()):  # the sum of finite elements may overflow: count
            self.bad = int((~self.buffer.isfinite()).sum())
        return self.bad > 0

    def take_back(self) -> None:
        """Does nothing: there is no memory."""

    def write(self, target: Tensor, factor: float, share: float) -> None:
        """Multiplies ``target``, which is the buffer, by ``factor``."""
        target.mul_(factor)

    def commit(self) -> None:
        """Nothing."""

    def rollback(self) -> None:
        """Nothing."""


@dataclass(eq=False)
class _MemoryRoute:
    """What the routes with a memory share: its operands, and what the pass over the gradient reported."""

    memory: Memory
    held: BucketMemory
    operands: Fused
    context: Context
    bad = misses = 0
    where = "on this rank"
    _flags: Tensor | None = field(default=None, init=False)
    _active: Tensor | None = field(default=None, init=False)

    def _corrected(self, out: Selected) -> None:
        """Reads the report of the pass that added the gradient. It waits for the device."""
        _, self.bad, self.misses, left_out = out.report.tolist()
        self._flags = out.active
        self._active = out.active if left_out else None


@dataclass(eq=False)
class DenseRoute(_MemoryRoute):
    """All-reduces the whole corrected gradient, residual included."""

    _mask: Tensor | None = field(default=None, init=False)
    _values: Tensor | None = field(default=None, init=False)
    _rounding: Tensor | None = field(default=None, init=False)

    def correct(self) -> None:
        """Adds the gradient to the residual. A parameter whose gradient is all zero sends nothing."""
        self._corrected(self.memory.accumulate(self.operands))
        self._mask = self.held.mask(self._active)

    def exchange(self, transport: Transport) -> bool:
        """All-reduces the corrected gradient and the vote."""
        residual = self.held.residual
        sent = residual if self._mask is None else residual * self._mask
        self._values, thrown_away = summed(transport, sent, self.bad > 0, self.context)
        return thrown_away

    def take_back(self) -> None:
        """Takes the gradient out of the memory."""
        self.memory.undo(self.held, self.operands, self._active)

    def write(self, target: Tensor, factor: float, share: float) -> None:
        """Overwrites ``target`` (n,) with ``factor`` times the sum."""
        assert self._values is not None
        self.held.end(self._flags)
        self._rounding = write_dense(target, self._values, factor, share)
        self._values = None

    def commit(self) -> None:
        """Removes what was sent from the residual, and adds what rounding kept from the model.

        Until the commit the residual still holds what was sent.
        """
        residual = self.held.residual
        kept = residual.new_zeros(()) if self._mask is None else residual * ~self._mask
        residual.copy_(kept if self._rounding is None else kept + self._rounding)

    def rollback(self) -> None:
        """Does nothing: the residual still holds what was sent."""


@dataclass(eq=False)
class LowBitRoute(_MemoryRoute):
    """Sends every element of the corrected gradient in few bits. What both roundings keep is remembered.

    Attributes:
        aggregator: the exchange.
        chunk: what this rank keeps as an owner. None: nothing is kept (``NoMemory``).
    """

    aggregator: LowBit
    chunk: OwnedChunk | None
    _out: LowBitMean | None = field(default=None, init=False)
    _rounding: Tensor | None = field(default=None, init=False)

    def correct(self) -> None:
        """Adds the gradient to the residual. A parameter whose gradient is all zero sends zeros."""
        self._corrected(self.memory.accumulate(self.operands))

    def exchange(self, transport: Transport) -> bool:
        """Averages the corrected gradient. The residual becomes what the first rounding kept."""
        residual, mask = self.held.residual, self.held.mask(self._active)
        sent = residual if mask is None else residual * mask
        owned = self.chunk.values if self.chunk is not None else self._nothing(transport)
        activity = None if self._flags is None else Activity(self._flags, self.held.offsets)
        self._out = self.aggregator.mean(transport, sent, owned, self.bad > 0, self.context, activity)
        if mask is not None:
            residual.mul_(~mask).add_(sent)
        return self._out.nonfinite

    def _nothing(self, transport: Transport) -> Tensor:
        start, stop = chunks(self.held.residual.numel(), transport.world_size)[transport.rank]
        return self.held.residual.new_zeros(stop - start)

    def take_back(self) -> None:
        """Takes back what was sent, and the gradient out of the memory."""
        assert self._out is not None
        self._out.give_back(self.held.residual)
        self.memory.undo(self.held, self.operands, self._active)
        if self.chunk is not None:
            self.chunk.recall()  # as the residual, where the step was begun as undoable

    def write(self, target: Tensor, factor: float, share: float) -> None:
        """Overwrites ``target`` (n,) with ``share`` times the mean, which is ``factor`` times the sum."""
        assert self._out is not None
        self.held.end(self._flags)
        if target.dtype == torch.float32 and target.is_contiguous():
            self._out.decode(target)
            if share != 1.0:
                target.mul_(share)
        else:
            self._rounding = write_dense(target, self._out.mean, share, share)

    def commit(self) -> None:
        """Makes what the second rounding kept this rank's, and adds what rounding kept from the model."""
        assert self._out is not None
        if self.chunk is not None:
            self.chunk.keep(self._out.owned)
        if self._rounding is not None:
            self.held.residual.add_(self._rounding)

    def rollback(self) -> None:
        """Puts back what this rank sent."""
        assert self._out is not None
        self._out.give_back(self.held.residual)


@dataclass(eq=False)
class SparseRoute(_MemoryRoute):
    """Sends ``k`` pairs of the corrected gradient. The rest stays in the residual.

    Attributes:
        selector: chooses the pairs.
        k: the number of pairs.
        mask_key: makes the random masks of one step's buckets differ; see
            :meth:`~commhooks.selection.selectors.Selector.select`.
        aggregator: sums the pairs over ranks. None: the caller exchanges ``pairs`` itself and calls
            :meth:`receive`.
        meter: measures delta; or None.
        pairs: the selected pairs.
        out: the sum, from ``exchange`` or ``receive`` until ``write``.
    """

    selector: Selector
    k: int
    mask_key: int
    aggregator: Aggregator | None = None
    meter: DeltaMeter | None = None
    pairs: SparseGrad = field(init=False)
    out: Aggregated | None = field(default=None, init=False)
    _contributed: SparseGrad = field(init=False)
    _rounding: SparseGrad | None = field(default=None, init=False)

    def correct(self) -> None:
        """Adds the gradient to the residual and takes ``pairs`` out of it into a message, in one pass."""
        message = empty_message(self.k, self.operands.grad.device)
        selected = self.selector.select(
            self.operands, self.k, step=self.context.step, mask_key=self.mask_key, out=places(message)
        )
        self._corrected(selected)
        self.pairs = self._contributed = SparseGrad(
            selected.values, selected.indices, self.operands.grad.numel(), message
        )

    def exchange(self, transport: Transport) -> bool:
        """Sums the pairs and the votes by the aggregator."""
        assert self.aggregator is not None
        self.out = out = self.aggregator.aggregate(transport, self.pairs, self.bad > 0, self.context)
        if self.meter is not None and not out.nonfinite:
            self.meter.add(transport, self.held.residual, out, self.k, self.context.tag)
        return out.nonfinite

    def receive(self, values: Tensor, indices: Tensor) -> None:
        """Takes the sum that the caller exchanged, in place of :meth:`exchange`.

        Args:
            values: shape ``(m, k)`` float32, rows to be added.
            indices: shape ``(m, k)`` int32.
        """
        self.out = Aggregated(values, indices, contributed=self.pairs, refused=None, nonfinite=False)

    def take_back(self) -> None:
        """Puts the pairs back and takes the gradient out of the memory."""
        self.memory.restore(self.held, self.pairs)
        self.memory.undo(self.held, self.operands, self._active)

    def write(self, target: Tensor, factor: float, share: float) -> None:
        """Puts refused pairs back and overwrites ``target`` with ``factor`` times the sum.

        Args:
            target: shape ``(n,)``.
            factor: as in :func:`~commhooks.reduction.write_back.write_sparse`.
            share: likewise.
        """
        assert self.out is not None
        out, self.out = self.out, None  # the rows of all ranks are not needed until the end of the step
        self._contributed = out.contributed
        self.held.end(self._flags)
        if out.refused is not None:
            self.memory.restore(self.held, out.refused)
        self._rounding = write_sparse(target, out.values, out.indices, factor, share)

    def commit(self) -> None:
        """Masks the velocity where this rank contributed, and adds what rounding kept to the residual.

        A step that sends everything does not mask: that would turn momentum off.
        """
        if self.k < self.operands.grad.numel():
            self.memory.mask_velocity(self.held, self._contributed)
        if self._rounding is not None:
            self.memory.restore(self.held, self._rounding)

    def rollback(self) -> None:
        """Puts back what this rank contributed. Before ``write`` that is all of its pairs."""
        self.held.end(self._flags)
        self.memory.restore(self.held, self._contributed)


def route_of(
    parts: tuple[Memory, BucketMemory, Fused, Context],
    selector: Selector | None,
    aggregator: Aggregator,
    k: int,
    dense: bool,
    chunk: OwnedChunk | None = None,
    meter: DeltaMeter | None = None,
) -> DenseRoute | LowBitRoute | SparseRoute:
    """Makes the route of a bucket that has a memory.

    Args:
        parts: the memory, the bucket's part of it, the operands, and which exchange it is.
        selector: chooses the pairs of a sparse route.
        aggregator: sums over ranks.
        k: the number of pairs of a sparse route.
        dense: whether the bucket is sent densely whatever the aggregator is.
        chunk: what this rank keeps as an owner in a low-bit route.
        meter: measures delta of a sparse route.
    """
    if dense or isinstance(aggregator, Dense):
        return DenseRoute(*parts)
    if isinstance(aggregator, LowBit):
        return LowBitRoute(*parts, aggregator, chunk)
    assert selector is not None
    return SparseRoute(*parts, selector, k, parts[3].bucket, aggregator, meter)


Route = PlainRoute | DenseRoute | LowBitRoute | SparseRoute
