"""Low bit: every element is sent in few bits, by a coded reduce-scatter and a coded all-gather."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import says_what_to_write
from ..gradient.sparse_grad import SparseGrad
from ..transports import Transport
from ..wire.low_bit import (
    BITS,
    chunks,
    code_bytes,
    decode,
    decode_add,
    encode,
    head_bytes,
    is_finite,
    read_heads,
    write_head,
)
from ..wire.message import Context
from .base import Aggregated, Aggregator


class Activity(NamedTuple):
    """Which parameters of a vector have a gradient on this rank.

    Attributes:
        flags: bool ``(parameters,)``.
        offsets: where each parameter begins in the vector, and the vector's end.
    """

    flags: Tensor
    offsets: Sequence[int]


@dataclass(frozen=True)
class LowBitMean:
    """The outcome of one exchange.

    Attributes:
        mean: shape ``(n,)``, float32, the same bits on every rank; empty where ``nonfinite``.
        owned: shape ``(m,)``, float32: what the second rounding kept of this rank's chunk. Where
            ``nonfinite`` it has no meaning.
        nonfinite: whether any rank voted non-finite, or a sum overflowed. The same on every rank.
        bits: of the codes.
        sent: this rank's codes of each chunk.
    """

    mean: Tensor
    owned: Tensor
    nonfinite: bool
    bits: int
    sent: Sequence[Tensor]

    def give_back(self, values: Tensor) -> None:
        """Adds what this rank sent to ``values`` ``(n,)``, up to rounding, when a step is thrown away."""
        bounds = chunks(values.numel(), len(self.sent))
        for (start, stop), codes in zip(bounds, self.sent, strict=True):
            decode_add(codes[None], self.bits, values[start:stop])


class LowBit(Aggregator):
    """Averages whole vectors in ``bits`` bits an element, without a selector. Both roundings are remembered.

    A vector is divided into one chunk a rank. Every rank sends the codes of each chunk to its owner. The
    owner adds the decoded values up in float32 and in rank order, takes the mean, adds what it kept before,
    and rounds again. The codes of the mean are all-gathered. What the first rounding keeps stays with the
    sender, and what the second keeps with the owner, so that nothing is lost:
    ``mean_p x_p + owned = mean + mean_p x'_p + owned'``, where ``x'`` and ``owned'`` are what is kept.

    A rank sends ``2 (P - 1) / P * n * (bits / 8 + 1/128)`` bytes, and headers. 1 bit suits changes of a model
    (:mod:`commhooks.averaging`). Gradients, whose largest elements are far from their mean, want 4 or more.
    16 bits are bfloat16, which has no scales: ``2 (P - 1) / P * n * 2`` bytes.

    Args:
        bits: 1, 2, 4, 8, or 16 for bfloat16. 32 sends the elements themselves, for comparisons.
        transport: ``"distributed"``, ``"mpi"``, or a ready ``Transport``. The Reducer opens it.

    Raises:
        ValueError: another number of bits, or an unknown transport.
    """

    takes_selection = False

    @says_what_to_write
    def __init__(self, bits: int = 4, transport: str | Transport = "distributed") -> None:
        if isinstance(bits, bool) or bits not in BITS:
            raise ValueError(f"bits must be one of {', '.join(map(str, BITS))}, got {bits!r}")
        super().__init__(transport)
        self.bits = int(bits)

    def aggregate(
        self, transport: Transport, pairs: SparseGrad, nonfinite: bool, context: Context
    ) -> Aggregated:
        raise TypeError("LowBit takes no selection: the reducer averages whole buckets instead")

    def mean(
        self,
        transport: Transport,
        values: Tensor,
        owned: Tensor,
        nonfinite: bool,
        context: Context,
        activity: Activity | None = None,
    ) -> LowBitMean:
        """Averages ``values`` over the ranks. A collective call.

        Args:
            transport: connects the ranks.
            values: shape ``(n,)``, float32, n the same on all ranks. Overwritten with what the first rounding
                kept, also where the exchange turns out non-finite.
            owned: shape ``(m,)``, float32: what the exchange before kept of this rank's chunk
                (:func:`~commhooks.wire.low_bit.chunks`), as a mean over the ranks. Only read.
            nonfinite: this rank's vote. No rank uses the values then.
            context: which exchange this is.
            activity: the mean of a parameter that no rank has a gradient of is 0, and what the owner kept of
                it stays. None: all parameters have one.

        Raises:
            SettingsMismatchError: another rank is at another exchange, or has another number of elements.
            PeerTimeoutError, PeerLostError: a rank is missing.
        """
        numel, bits, rank = values.numel(), self.bits, transport.rank
        bounds = chunks(numel, transport.world_size)
        parameters = 0 if activity is None else activity.flags.numel()
        flags = None if activity is None else activity.flags
        head = head_bytes(parameters)
        outgoing = []
        for start, stop in bounds:
            message = values.new_zeros(head + code_bytes(stop - start, bits), dtype=torch.uint8)
            write_head(message, context, nonfinite, numel, flags)
            encode(values[start:stop], bits, message[head:])
            outgoing.append(message)
        with transport.one_deadline():
            incoming = _to_owners(transport, outgoing, context)
            sent = [message[head:] for message in outgoing]
            thrown_away, anywhere = read_heads(incoming, context, numel, parameters)
            if thrown_away:
                return LowBitMean(values[:0], owned, True, bits, sent)
            start, stop = bounds[rank]
            total = values.new_empty(stop - start)
            decode(incoming[0, head:], bits, total)
            decode_add(incoming[1:, head:], bits, total)
            total.mul_(1.0 / transport.world_size).add_(owned)
            mean = self._rounded_again(transport, total, bounds, context)
        if mean is None:
            return LowBitMean(values[:0], owned, True, bits, sent)
        if activity is not None and not all(anywhere):
            _zero_inactive(mean, total, start, [*zip(activity.offsets, activity.offsets[1:], anywhere)])
        return LowBitMean(mean, total, False, bits, sent)

    def _rounded_again(
        self, transport: Transport, total: Tensor, bounds: list[tuple[int, int]], context: Context
    ) -> Tensor | None:
        """All-gathers the codes of the owners' chunks.

        Args:
            transport: connects the ranks.
            total: this rank's chunk ``(m,)``; overwritten with what the rounding keeps.
            bounds: of all chunks.
            context: which exchange this is.

        Returns:
            The decoded vector ``(n,)``. None: a chunk is not finite.
        """
        numel, bits, head = bounds[-1][1], self.bits, head_bytes(0)
        largest = max(stop - start for start, stop in bounds)
        message = total.new_zeros(head + code_bytes(largest, bits), dtype=torch.uint8)
        codes = message[head : head + code_bytes(total.numel(), bits)]
        encode(total, bits, codes)
        write_head(message, context, not is_finite(codes, total.numel(), bits), numel)
        gathered = message.new_empty((transport.world_size, message.numel()))
        transport.all_gather(message, gathered, tag=context.tag + 1, what=str(context))
        if read_heads(gathered, context, numel)[0]:
            return None
        mean = total.new_empty(numel)
        for (start, stop), row in zip(bounds, gathered, strict=True):
            decode(row[head : head + code_bytes(stop - start, bits)], bits, mean[start:stop])
        return mean

    def wire_bytes(self, k: int, world_size: int) -> int:
        """Returns the bytes a rank sends at most for a bucket of ``k`` elements of one parameter."""
        bounds = chunks(k, world_size)
        sizes = [code_bytes(stop - start, self.bits) for start, stop in bounds]
        scattered = sum(sizes) - min(sizes) + (world_size - 1) * head_bytes(1)
        return scattered + (world_size - 1) * (max(sizes) + head_bytes(0))

    def settings(self) -> dict[str, object]:
        return {"bits": self.bits}


def _to_owners(transport: Transport, outgoing: Sequence[Tensor], context: Context) -> Tensor:
    """Sends ``outgoing[r]`` to rank r. Returns what the ranks sent to this one, uint8 ``(P, size)``."""
    rank = transport.rank
    incoming = outgoing[rank].new_empty((transport.world_size, outgoing[rank].numel()))
    incoming[rank] = outgoing[rank]
    peers = [r for r in range(transport.world_size) if r != rank]
    if peers:
        transport.exchange(
            [(r, outgoing[r]) for r in peers],
            [(r, incoming[r]) for r in peers],
            tag=context.tag,
            what=f"{context}, to the owners",
        )
    return incoming


def _zero_inactive(
    mean: Tensor, owned: Tensor, start: int, parameters: Sequence[tuple[int, int, bool]]
) -> None:
    """Sets the mean of parameters without a gradient on any rank to 0. Its owner keeps what was there.

    Args:
        mean: shape ``(n,)``, overwritten.
        owned: shape ``(m,)``, what this rank kept of its chunk, which begins at ``start``; overwritten.
        start: of the chunk.
        parameters: where each begins and ends in the vector, and whether any rank has a gradient of it.
    """
    for begin, end, anywhere in parameters:
        if not anywhere:
            first, last = max(begin, start), min(end, start + owned.numel())
            if first < last:
                owned[first - start : last - start] += mean[first:last]
            mean[begin:end] = 0.0
