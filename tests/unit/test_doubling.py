"""All-gather and all-reduce by recursive doubling, on threads: rows, sums with the same bits on all ranks, few rounds."""

import pytest
import torch
from ranks import assert_same_bits

from commhooks.errors import PeerTimeoutError
from commhooks.transports import doubling, in_process


@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("numel", [1, 3, 1000])
def test_rows_and_sums(world_size, numel):
    rows_of = [torch.randn(numel, generator=torch.Generator().manual_seed(r)) for r in range(world_size)]

    def work(transport):
        mine = rows_of[transport.rank].clone()
        rows = torch.full((world_size, numel), float("nan"))
        doubling.all_gather(transport, mine, rows, tag=0, what="gather")
        doubling.all_reduce(transport, mine, tag=1, what="sum")
        whole = torch.full((numel,), transport.rank + 1, dtype=torch.int64)
        doubling.all_reduce(transport, whole, tag=2, what="sum of integers")
        return rows, mine, whole

    sums = rows_of
    while len(sums) > 1:  # neighbours first, then their sums
        sums = [a + b for a, b in zip(sums[::2], sums[1::2], strict=True)]
    for rows, total, whole in in_process.run(world_size, work):
        assert torch.equal(rows, torch.stack(rows_of))
        assert_same_bits(total, sums[0])
        assert whole.tolist() == [world_size * (world_size + 1) // 2] * numel


@pytest.mark.parametrize("call", [doubling.all_gather, doubling.all_reduce])
def test_the_missing_rank_and_the_distance_are_named(call):
    def work(transport):
        if transport.rank == 3:
            return None
        buffers = (torch.ones(5), torch.empty(4, 5)) if call is doubling.all_gather else (torch.ones(5),)
        with pytest.raises(PeerTimeoutError) as caught:
            call(transport, *buffers, tag=0, what="bucket 3")
        return str(caught.value)

    messages = in_process.run(4, work, timeout_s=0.3)
    for rank, distance in ((2, 1), (1, 2)):  # they wait for rank 3 itself
        assert messages[rank].startswith(f"rank {rank}, bucket 3, distance {distance}"), messages
        assert "rank 3" in messages[rank]
