"""Ranks as threads: which error a failed run raises, and the barrier, which every transport has."""

import time

import pytest
import torch

from commhooks.transports import in_process


def test_the_first_cause_is_raised():
    """Rank 1 fails only because rank 0 did, and later."""

    def work(transport):
        if transport.rank == 0:
            raise ZeroDivisionError("the cause")
        while transport._mailboxes.broken is None:
            time.sleep(1e-3)
        time.sleep(0.05)  # past the end of rank 0
        raise KeyError("a consequence")

    with pytest.raises(ZeroDivisionError, match="the cause"):
        in_process.run(2, work)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 8])
def test_nobody_passes_the_barrier_before_the_last_has_come(world_size):
    come = []

    def work(transport):
        time.sleep(0.02 * transport.rank)
        come.append(transport.rank)
        transport.barrier(tag=5, what="all here")
        return len(come)

    assert in_process.run(world_size, work) == [world_size] * world_size


def test_a_root_that_is_no_rank_is_refused():
    (transport,) = in_process.group(1)
    for root in (-1, 1):
        with pytest.raises(ValueError, match=f"root must be a rank below 1, got {root}"):
            transport.broadcast(torch.zeros(2), root=root, tag=0, what="weights")
