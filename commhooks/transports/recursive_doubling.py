"""All-gather and all-reduce by recursive doubling, for numbers of ranks that are a power of two.

In round i every rank swaps all its data with the rank at distance 2^i. This takes ``log2 P`` rounds, where a
ring takes ``P - 1`` or ``2 (P - 1)``. It is used for small buffers where a library's own collective was
measured to be slower (docs/performance.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from .base import Transport

DOUBLING_BYTES = 32768
"""Up to this size the rounds of a ring cost more time than the additional bytes of recursive doubling."""


def all_gather(transport: Transport, send: Tensor, receive: Tensor, *, tag: int, what: str) -> None:
    """Overwrites ``receive[r]`` with ``send`` of rank r, by as many bytes as a ring."""
    receive[transport.rank] = send
    distance = 1
    while distance < transport.world_size:
        mine = transport.rank // distance * distance
        theirs = mine ^ distance
        _swap(
            transport,
            distance,
            receive[mine : mine + distance],
            receive[theirs : theirs + distance],
            tag,
            what,
        )
        distance *= 2


def all_reduce(transport: Transport, buffer: Tensor, *, tag: int, what: str) -> None:
    """Overwrites ``buffer`` with its sum over the ranks, bit-identical on every rank.

    In each round both ranks of a pair add the same two partial sums. A rank sends the buffer ``log2 P``
    times, where a ring sends it less than twice.
    """
    other, distance = buffer.new_empty(buffer.shape), 1
    while distance < transport.world_size:
        _swap(transport, distance, buffer, other, tag, what)
        buffer += other
        distance *= 2


def _swap(transport: Transport, distance: int, send: Tensor, receive: Tensor, tag: int, what: str) -> None:
    peer = transport.rank ^ distance
    transport.move([(peer, send)], [(peer, receive)], tag, f"{what}, distance {distance}")
