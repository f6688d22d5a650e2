"""Waits end by the time in which the process ran, and an exchange's rounds have one deadline."""

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from launch import spawn_gloo

from commhooks import CommHooksError, GTopK, LowBit, PeerTimeoutError
from commhooks.gradient.sparse_grad import SparseGrad
from commhooks.transports import deadline, in_process, pairwise
from commhooks.transports.distributed import DistributedTransport
from commhooks.wire.message import Context


def clock(monkeypatch, times):
    readings = iter(times)
    monkeypatch.setattr(deadline.time, "monotonic", lambda: next(readings))


def test_it_passes_after_its_time_of_polls(monkeypatch):
    clock(monkeypatch, [0.0, 0.4, 0.8, 1.2, 1.6, 2.1, 2.2])
    wait = deadline.Deadline(2.0)
    assert [wait.has_passed() for _ in range(6)] == [False] * 4 + [True] * 2


def test_hours_in_which_the_process_was_stopped_count_as_one_pause(monkeypatch):
    clock(monkeypatch, [0.0, 0.5, 7200.5, 7200.6, 7201.0, 7203.1])
    wait = deadline.Deadline(4.0)
    assert [wait.has_passed() for _ in range(4)] == [False] * 4
    assert not wait.has_passed()  # 0.5 + 1 + 0.1 + 0.4 + 1: the last pause counts as one second too


def test_a_short_limit_survives_one_stop(monkeypatch):
    clock(monkeypatch, [0.0, 100.0, 200.0, 300.0, 400.0, 500.0])
    wait = deadline.Deadline(0.4)
    assert [wait.has_passed() for _ in range(5)] == [False] * 4 + [True]


def test_waits_that_do_not_poll_count_all_time(monkeypatch):
    clock(monkeypatch, [0.0, 100.0, 250.0])
    wait = deadline.Deadline(200.0, by_clock=True)
    assert [wait.left_s(), wait.left_s()] == [100.0, -50.0]


def gtopk(algorithm):
    def call(transport):
        indices = torch.tensor([transport.rank, 10], dtype=torch.int32)
        pairs = SparseGrad(torch.ones(2), indices, 20)
        GTopK(transport, algorithm).aggregate(transport, pairs, False, Context(0, 0))

    return call


def low_bit(transport):
    owned = torch.zeros(30 if transport.rank == 4 else 0)  # one block, which is the last rank's
    LowBit(8, transport).mean(transport, torch.ones(30), owned, False, Context(0, 0))


CALLS = {
    "all_gather": lambda t: t.all_gather(torch.ones(3), torch.empty(t.world_size, 3), tag=0, what=""),
    "all_reduce": lambda t: t.all_reduce(torch.ones(30), tag=0, what=""),
    "broadcast": lambda t: t.broadcast(torch.ones(3), tag=0, what=""),
    "barrier": lambda t: t.barrier(tag=0, what=""),
    "gtopk doubling": gtopk("doubling"),
    "gtopk tree": gtopk("tree"),
    "low bit": low_bit,
}


class InRounds(in_process.InProcessTransport):
    """Its collectives consist of rounds, as those over MPI and gloo do. It notes the deadline of each round."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.deadlines = []

    def move(self, sends, receives, tag, what):
        self.deadlines.append(self.deadline())
        super().move(sends, receives, tag, what)

    def _all_gather(self, send, receive, tag, what):
        pairwise.all_gather(self, send, receive, tag=tag, what=what)

    def _all_reduce(self, buffer, tag, what):
        pairwise.all_reduce(self, buffer, tag=tag, what=what)


@pytest.mark.parametrize("call", CALLS)
def test_all_rounds_of_an_exchange_have_one_deadline(call):
    """Each round waited for ``timeout_s``: log2 P times as long as promised, or P - 1 times."""
    boxes = in_process.group(1)[0]._mailboxes
    transports = [InRounds(r, 5, boxes, 30.0) for r in range(5)]

    def work(rank):
        noted = []
        for _ in range(2):
            CALLS[call](transports[rank])
            noted.append(transports[rank].deadlines)
            transports[rank].deadlines = []
        return noted

    with ThreadPoolExecutor(5) as pool:
        ranks = list(pool.map(work, range(5)))
    for first, second in ranks:
        assert all(d is first[0] for d in first) and all(d is second[0] for d in second)
        assert first[0] is not second[0]
    assert max(len(first) for first, _ in ranks) > 1


def test_a_shorter_timeout_ends_with_its_block():
    waiting, told = in_process.group(2, timeout_s=20.0)[0], []
    started = time.monotonic()
    for limit in (0.3, 40.0):
        with pytest.raises(PeerTimeoutError, match="within 0.3 s"):
            with waiting.shorter_timeout(0.3), waiting.shorter_timeout(limit):
                told.append(waiting.timeout_s)
                waiting.barrier(tag=0, what="leaving")
    assert told == [0.3, 0.3] and waiting.timeout_s == 20.0
    assert time.monotonic() - started < 20.0


def two_late_messages(rank, size):
    transport, message = DistributedTransport(timeout_s=1.0), torch.zeros(1)
    if rank == 1:
        for _ in range(2):
            time.sleep(0.7)
            with contextlib.suppress(CommHooksError):  # the other may have given up
                transport.exchange([(0, message)], [], tag=0, what="late")
        return "sent"
    try:
        with transport.one_deadline():
            for _ in range(2):
                transport.exchange([], [(1, message)], tag=0, what="waiting")
    except PeerTimeoutError as error:
        return str(error)
    return "received"


def test_rounds_that_are_late_together_are_a_timeout_over_gloo():
    message, _ = spawn_gloo(two_late_messages, 2)
    assert message == "rank 0, waiting: no answer from rank 1 within 1 s"
