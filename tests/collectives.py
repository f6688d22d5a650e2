"""What the tests of `rotation` and `doubling` have in common: both have an all_gather and an all_reduce."""

import pytest
import torch

from commhooks.errors import PeerTimeoutError


def rows_and_sums(module, transport, rows_of):
    """Rows of all ranks, the sum of this rank's row over ranks, and the sum of the integers rank + 1, as many."""
    world_size, numel = len(rows_of), rows_of[0].numel()
    mine = rows_of[transport.rank].clone()
    rows = torch.full((world_size, numel), float("nan"))
    module.all_gather(transport, mine, rows, tag=0, what="gather")
    module.all_reduce(transport, mine, tag=1, what="sum")
    whole = torch.full((numel,), transport.rank + 1, dtype=torch.int64)
    module.all_reduce(transport, whole, tag=3, what="sum of integers")
    return rows, mine, whole


def message_of_timeout(call, transport):
    """What this rank is told when another does not come to ``call``."""
    buffers = [torch.ones(5)]
    if call.__name__ == "all_gather":
        buffers.append(torch.empty(transport.world_size, 5))
    with pytest.raises(PeerTimeoutError) as caught:
        call(transport, *buffers, tag=0, what="bucket 3")
    return str(caught.value)
