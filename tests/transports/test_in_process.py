"""Ranks as threads: which error a failed run raises, and the barrier, which every transport has."""

import queue
import threading
import time

import pytest
import torch

from commhooks import PeerLostError
from commhooks.transports import in_process


def test_the_first_cause_is_raised():
    """Rank 1 fails only because rank 0 did, and later."""

    def work(transport):
        if transport.rank == 0:
            raise ZeroDivisionError("the cause")
        while not transport._mailboxes.failed:
            time.sleep(1e-3)
        time.sleep(0.05)  # past the end of rank 0
        raise KeyError("a consequence")

    with pytest.raises(ZeroDivisionError, match="the cause"):
        in_process.run(2, work)


class FailsAfterTheFirstLook:
    """A box that was empty when it was looked into, and whose sender then sends and fails."""

    def __init__(self, sender):
        self.sender, self.box = sender, queue.SimpleQueue()

    def get(self, timeout):
        if self.sender is None:
            return self.box.get(timeout=timeout)
        self.box.put(torch.ones(2))
        self.sender.fail(ValueError("after sending"))
        self.sender = None
        raise queue.Empty


def test_what_a_rank_sent_before_it_failed_is_delivered_first():
    receiver, sender = in_process.group(2, timeout_s=20.0)
    receiver._mailboxes._boxes[1, 0, 0] = FailsAfterTheFirstLook(sender)
    buffer = torch.zeros(2)
    receiver.move([], [(1, buffer)], 0, "a message")
    assert torch.equal(buffer, torch.ones(2))
    with pytest.raises(PeerLostError, match="rank 0, another message: another rank failed") as raised:
        receiver.move([], [(1, buffer)], 0, "another message")
    assert isinstance(raised.value.__cause__, ValueError)


def test_a_message_of_a_good_rank_is_waited_for_after_another_rank_has_failed(monkeypatch):
    monkeypatch.setattr(in_process, "_GRACE_S", 60.0)
    receiver, sender, other = in_process.group(3, timeout_s=60.0)
    other.fail(ValueError("alone"))
    buffer = torch.zeros(2)
    late = threading.Timer(0.2, lambda: sender.move([(0, torch.ones(2))], [], 0, "a message"))
    late.start()
    receiver.move([], [(1, buffer)], 0, "a message")
    late.join()
    assert torch.equal(buffer, torch.ones(2))
    monkeypatch.setattr(in_process, "_GRACE_S", 0.1)
    with pytest.raises(PeerLostError):
        receiver.move([], [(1, buffer)], 0, "a message")


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
