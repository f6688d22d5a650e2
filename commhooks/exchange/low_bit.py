"""Low bit: every element is sent in few bits, by a coded reduce-scatter and a coded all-gather."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
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
        owned: shape ``(m,)``, float32: what the second rounding kept of this rank's chunk. Where
            ``nonfinite`` it has no meaning.
        nonfinite: whether any rank voted non-finite, or a sum overflowed. The same on every rank.
        bits: of the codes.
        sent: this rank's codes of each chunk.
        codes: of the mean, each chunk's. Empty where ``nonfinite``.
        bounds: where each chunk begins and ends.
        inactive: where the parameters begin and end that no rank has a gradient of.
    """

    owned: Tensor
    nonfinite: bool
    bits: int
    sent: Sequence[Tensor]
    codes: Sequence[Tensor] = ()
    bounds: Sequence[tuple[int, int]] = ((0, 0),)
    inactive: Sequence[tuple[int, int]] = ()

    @property
    def mean(self) -> Tensor:
        """The mean as a new tensor ``(n,)``, float32; empty where ``nonfinite``."""
        return self.decode(self.owned.new_empty(self.bounds[-1][1]))

    def decode(self, out: Tensor) -> Tensor:
        """Overwrites ``out`` ``(n,)``, float32, with the mean, the same bits on all ranks, and returns it."""
        for (start, stop), codes in zip(self.bounds, self.codes, strict=False):
            decode(codes, self.bits, out[start:stop])
        for begin, end in self.inactive:
            out[begin:end] = 0.0
        return out

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
                return LowBitMean(owned, True, bits, sent)
            start, stop = bounds[rank]
            total = values.new_empty(stop - start)
            decode(incoming[0, head:], bits, total)
            decode_add(incoming[1:, head:], bits, total)
            total.mul_(1.0 / transport.world_size).add_(owned)
            codes = self._rounded_again(transport, total, bounds, context)
        if codes is None:
            return LowBitMean(owned, True, bits, sent)
        inactive = [] if activity is None else _nowhere(activity.offsets, anywhere)
        if inactive:
            _keep_inactive(total, start, inactive, codes[rank], bits)
        return LowBitMean(total, False, bits, sent, codes, bounds, inactive)

    def _rounded_again(
        self, transport: Transport, total: Tensor, bounds: list[tuple[int, int]], context: Context
    ) -> list[Tensor] | None:
        """All-gathers the codes of the owners' chunks.

        Args:
            transport: connects the ranks.
            total: this rank's chunk ``(m,)``; overwritten with what the rounding keeps.
            bounds: of all chunks.
            context: which exchange this is.

        Returns:
            The codes of each chunk. None: a chunk is not finite.
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
        sizes = [code_bytes(stop - start, bits) for start, stop in bounds]
        return [row[head : head + size] for row, size in zip(gathered, sizes, strict=True)]

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


def _nowhere(offsets: Sequence[int], anywhere: Sequence[bool]) -> list[tuple[int, int]]:
    """Returns where the parameters begin and end that no rank has a gradient of."""
    return [where for where, active in zip(pairwise(offsets), anywhere, strict=True) if not active]


def _keep_inactive(
    owned: Tensor, start: int, inactive: Sequence[tuple[int, int]], codes: Tensor, bits: int
) -> None:
    """Leaves what was kept of parameters without a gradient on any rank with its owner: their mean is 0.

    Args:
        owned: shape ``(m,)``, what the rounding kept of this rank's chunk, which begins at ``start``;
            overwritten.
        start: of the chunk.
        inactive: where these parameters begin and end in the vector.
        codes: of this rank's chunk.
        bits: of the codes.
    """
    mean = owned.new_empty(owned.numel())
    decode(codes, bits, mean)
    for begin, end in inactive:
        first, last = max(begin - start, 0), min(end - start, owned.numel())
        if first < last:
            owned[first:last] += mean[first:last]
