"""All-gather and all-reduce in turns.

In turn i every rank sends to the i-th rank after it and receives from the i-th rank before it.

As many messages and bytes as a ring, and no link ever carries two of them; any number of ranks. Used where
measurement says that a library's own collective is slower (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from .base import Transport


def all_gather(transport: Transport, send: Tensor, receive: Tensor, *, tag: int, what: str) -> None:
    """``receive[r] = send of rank r``, in ``P - 1`` turns."""
    receive[transport.rank] = send
    _turns(transport, [send] * transport.world_size, receive, tag, what)


def all_reduce(transport: Transport, buffer: Tensor, *, tag: int, what: str) -> None:
    """``buffer`` becomes the sum over ranks, added in rank order: the same bits on every rank.

    Every rank sums one part of ``P`` and sends it to all: ``2 (P - 1)`` turns, tags ``tag`` and ``tag + 1``.
    """
    flat, world_size = buffer.view(-1), transport.world_size
    bounds = [flat.numel() * r // world_size for r in range(world_size + 1)]
    parts = [flat[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
    mine = parts[transport.rank]
    rows = mine.new_empty((world_size, mine.numel()))
    rows[transport.rank] = mine
    _turns(transport, parts, rows, tag, what)
    mine.copy_(rows[0])
    for row in rows[1:]:
        mine += row
    _turns(transport, [mine] * world_size, parts, tag + 1, what)


def _turns(
    transport: Transport, sends: Sequence[Tensor], receives: Sequence[Tensor] | Tensor, tag: int, what: str
) -> None:
    """``sends[r]`` goes to rank r, ``receives[r]`` comes from rank r; what is empty does not travel."""
    for turn in range(1, transport.world_size):
        to = (transport.rank + turn) % transport.world_size
        source = (transport.rank - turn) % transport.world_size
        transport.move(
            [(to, sends[to])] if sends[to].numel() else [],
            [(source, receives[source])] if receives[source].numel() else [],
            tag,
            f"{what}, turn {turn}",
        )
