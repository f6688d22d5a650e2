"""All-gather and all-reduce by recursive doubling, on threads: rows, sums with the same bits on all ranks, few rounds."""

import pytest
import torch
from collectives import message_of_timeout, rows_and_sums
from ranks import assert_same_bits

from commhooks.transports import in_process, recursive_doubling


@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("numel", [1, 3, 1000])
def test_rows_and_sums(world_size, numel):
    rows_of = [torch.randn(numel, generator=torch.Generator().manual_seed(r)) for r in range(world_size)]

    sums = rows_of
    while len(sums) > 1:  # neighbours first, then their sums
        sums = [a + b for a, b in zip(sums[::2], sums[1::2], strict=True)]
    for rows, total, whole in in_process.run(
        world_size, lambda t: rows_and_sums(recursive_doubling, t, rows_of)
    ):
        assert torch.equal(rows, torch.stack(rows_of))
        assert_same_bits(total, sums[0])
        assert whole.tolist() == [world_size * (world_size + 1) // 2] * numel


@pytest.mark.parametrize("call", [recursive_doubling.all_gather, recursive_doubling.all_reduce])
def test_the_missing_rank_and_the_distance_are_named(call):
    def work(transport):
        if transport.rank == 3:
            return None
        return message_of_timeout(call, transport)

    messages = in_process.run(4, work, timeout_s=0.3)
    for rank, distance in ((2, 1), (1, 2)):  # they wait for rank 3 itself
        assert messages[rank].startswith(f"rank {rank}, bucket 3, distance {distance}"), messages
        assert "rank 3" in messages[rank]
