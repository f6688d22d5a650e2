"""All-gather and all-reduce in turns, on threads: rows, sums with the same bits on all ranks, and nothing for nobody."""

import pytest
import torch
from collectives import message_of_timeout, rows_and_sums
from ranks import assert_same_bits

from commhooks.transports import in_process, pairwise


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8, 17])
@pytest.mark.parametrize("numel", [0, 1, 2, 3, 17, 1000])
def test_rows_and_sums(world_size, numel):
    """Fewer elements than ranks, too: then some ranks sum nothing."""
    rows_of = [torch.randn(numel, generator=torch.Generator().manual_seed(r)) for r in range(world_size)]

    expected = rows_of[0].clone()
    for row in rows_of[1:]:  # in rank order
        expected += row
    for rows, total, whole in in_process.run(world_size, lambda t: rows_and_sums(pairwise, t, rows_of)):
        assert torch.equal(rows, torch.stack(rows_of))
        assert_same_bits(total, expected)
        assert whole.tolist() == [world_size * (world_size + 1) // 2] * numel


def test_it_uses_no_other_tag():
    """The next tag may be another message's."""

    def work(transport):
        move, tags = transport.move, set()

        def recorded(sends, receives, tag, what):
            tags.add(tag)
            move(sends, receives, tag, what)

        transport.move = recorded
        rows_and_sums(pairwise, transport, [torch.ones(10)] * 3)
        return tags

    assert in_process.run(3, work) == [{0, 1, 3}] * 3


@pytest.mark.parametrize("call", [pairwise.all_gather, pairwise.all_reduce])
def test_the_missing_rank_and_the_turn_are_named(call):
    def work(transport):
        if transport.rank == 2:
            return None
        return message_of_timeout(call, transport)

    for rank, message in enumerate(in_process.run(3, work, timeout_s=0.3)):
        if rank != 2:
            assert message.startswith(f"rank {rank}, bucket 3, turn ") and "rank 2" in message, message
