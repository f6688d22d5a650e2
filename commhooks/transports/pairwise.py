"""All-gather and all-reduce by pairwise messages, for any number of ranks.

In turn i every rank sends to the i-th rank after it and receives from the i-th rank before it. This takes as
many messages and bytes as a ring, and each rank sends and receives one message at a time. It is used where a
library's own collective was measured to be slower (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from .base import Transport


def all_gather(transport: Transport, send: Tensor, receive: Tensor, *, tag: int, what: str) -> None:
    """Overwrites ``receive[r]`` with ``send`` of rank r, in ``P - 1`` turns."""
    receive[transport.rank] = send
    _turns(transport, [send] * transport.world_size, receive, tag, what)


def all_reduce(transport: Transport, buffer: Tensor, *, tag: int, what: str) -> None:
    """Overwrites ``buffer`` with its sum over the ranks, bit-identical on every rank.

    Every rank adds up one of ``P`` parts in rank order and sends the result to all. This takes ``2 (P - 1)``
    turns. Messages between two ranks arrive in the order in which they were sent, so one tag suffices.
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
    _turns(transport, [mine] * world_size, parts, tag, what)


def _turns(
    transport: Transport, sends: Sequence[Tensor], receives: Sequence[Tensor] | Tensor, tag: int, what: str
) -> None:
    """Sends ``sends[r]`` to rank r and receives ``receives[r]`` from it. Empty tensors are not sent."""
    for turn in range(1, transport.world_size):
        to = (transport.rank + turn) % transport.world_size
        source = (transport.rank - turn) % transport.world_size
        transport.move(
            [(to, sends[to])] if sends[to].numel() else [],
            [(source, receives[source])] if receives[source].numel() else [],
            tag,
            f"{what}, turn {turn}",
        )
