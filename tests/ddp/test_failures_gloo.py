"""A rank that dies and one that stalls, under DDP on gloo: typed errors reach the user, nothing hangs."""

import os
import signal
import time

import pytest
import torch
from ddp_cases import Data, loss_of, make_net, make_state, parameter_buckets, sparse_ddp, wrap
from launch import spawn_gloo, torchrun

from commhooks import PeerLostError, PeerTimeoutError, register

TIMEOUT_S = 3.0


def act_in_bucket(state, bucket, action):
    """Runs ``action`` on the worker, just before the rank's own exchange of this bucket in the third step."""
    reduce = state.reducer.reduce

    def wrapped(b, scale=1.0):
        if b.index == bucket and state.reducer.step == 2:
            action()
        return reduce(b, scale)

    state.reducer.reduce = wrapped


def trouble(rank, size, scheme, action):
    ddp, state = sparse_ddp(scheme, 0.1, timeout_s=TIMEOUT_S)
    if rank == 1:
        act_in_bucket(state, 1, action)
    data = Data(rank)
    started = time.monotonic()
    out = {"steps": 0}
    try:
        for step in range(4):
            started = time.monotonic()
            ddp.zero_grad()
            loss_of(ddp, data(step)).backward()
            out["steps"] += 1
    except RuntimeError as error:
        out["seconds"] = time.monotonic() - started
        out["backward"] = type(error).__name__, str(error)
    try:
        loss_of(ddp, data(9))
    except Exception as error:
        out["forward"] = type(error).__name__, str(error)
    out["state"] = type(state.error).__name__, str(state.error)
    started = time.monotonic()
    state.close()
    out["close"] = time.monotonic() - started
    return out


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def stall():
    time.sleep(4 * TIMEOUT_S)


def check(out, rank, names, kinds):
    assert out["steps"] == 2 and out["close"] < 10.0
    # The next forward raises the type itself.
    assert out["state"][0] in kinds and out["forward"] == out["state"]
    assert out["state"][0] in out["backward"][1] and out["state"][1] in out["backward"][1]
    message = out["state"][1]
    assert f"rank {rank}" in message and "bucket 1, step 2" in message, message
    assert any(name in message for name in names), message


@pytest.mark.parametrize("scheme", ["gtopk", "topk"])
def test_a_rank_that_dies_in_mid_step(scheme):
    outcomes = spawn_gloo(trouble, 3, args=(scheme, die), timeout=90, check=False)
    assert outcomes[1].exitcode == -signal.SIGKILL
    lost = 0
    for rank in (0, 2):
        assert outcomes[rank].exitcode == 0, outcomes[rank].error
        out = outcomes[rank].result
        check(out, rank, ("rank 1", "rank 0", "any rank"), ("PeerLostError", "PeerTimeoutError"))
        lost += out["state"][0] == "PeerLostError"
        assert out["seconds"] < TIMEOUT_S + 30.0
    assert lost  # whoever talks to the dead rank itself sees its connection break


@pytest.mark.parametrize("scheme, size", [("gtopk", 2), ("topk", 3), ("randomk", 3)])
def test_a_rank_that_stalls_in_mid_step(scheme, size):
    """Exchange, all-gather and all-reduce: the others name it. Who gives up breaks the others' connections."""
    outcomes = spawn_gloo(trouble, size, args=(scheme, stall), timeout=90, check=False)
    kinds = ("PeerLostError", "PeerTimeoutError")
    waiting = [rank for rank in range(size) if rank != 1]
    for rank in waiting:
        assert outcomes[rank].exitcode == 0, outcomes[rank].error
        out = outcomes[rank].result
        check(out, rank, ("rank 1",), kinds)
        assert "any rank" not in out["state"][1]
        assert TIMEOUT_S * 0.9 < out["seconds"] < TIMEOUT_S + 30.0
    assert "PeerTimeoutError" in [outcomes[rank].result["state"][0] for rank in waiting]
    assert outcomes[1].exitcode == 0, outcomes[1].error  # it wakes into an error of its own
    assert outcomes[1].result["state"][0] in kinds


def catchable(rank, size):
    """A user who wants the type catches it at the next forward; later steps raise at once, nothing is sent."""
    ddp, state = sparse_ddp("gtopk", 0.1, timeout_s=20.0)
    # DDP exchanges its new layout at the second forward: past that, it is our exchange that waits.
    for step in range(2):
        ddp.zero_grad()
        loss_of(ddp, Data(rank)(step)).backward()
    state.reducer.transport.timeout_s = 1.0
    if rank == 1:
        time.sleep(4.0)
        return True
    with pytest.raises(RuntimeError, match="PeerTimeoutError"):
        ddp.zero_grad()
        loss_of(ddp, Data(rank)(2)).backward()
    for _ in range(2):
        with pytest.raises(PeerTimeoutError) as caught:
            loss_of(ddp, Data(rank)(2))
        assert not isinstance(caught.value, PeerLostError)
    started = time.monotonic()
    future = state.submit(torch.zeros(4), 0, (torch.nn.Parameter(torch.zeros(4)),), True)
    with pytest.raises(RuntimeError, match="PeerTimeoutError"):
        future.wait()
    return time.monotonic() - started < 0.5


def test_a_failed_state_stays_failed():
    assert spawn_gloo(catchable, 2, timeout=60) == [True, True]


PROGRAM = """
import os, time
import torch, torch.distributed as dist
import ddp_cases as cases

dist.init_process_group("gloo")
rank = dist.get_rank()
ddp, state = cases.sparse_ddp("gtopk", 0.1, timeout_s=float(os.environ["TIMEOUT_S"]))
data = cases.Data(rank)
for step in range(4):
    if os.environ["WHAT"] == "stall" and rank == 1 and step == 2:
        time.sleep(300)
    ddp.zero_grad()
    cases.loss_of(ddp, data(step)).backward()
grads = torch.cat([p.grad.flatten() for p in ddp.parameters()])
assert cases.same_on_all_ranks(grads) and state.stats()["step"] == 4
print("sent", state.stats()["bytes_sent"])
state.close()
dist.destroy_process_group()
"""


def test_the_distributed_transport_inside_torchrun():
    done = torchrun(PROGRAM, 2, timeout=120, env={"TIMEOUT_S": "60", "WHAT": "train"})
    assert done.stdout.count("sent") == 2


def test_a_stalled_rank_ends_a_torchrun_job():
    done = torchrun(PROGRAM, 2, timeout=150, env={"TIMEOUT_S": "5", "WHAT": "stall"}, check=False)
    assert not done.timed_out and done.returncode != 0
    assert "PeerTimeoutError" in done.stderr and "bucket 0, step 2" in done.stderr and "rank 1" in done.stderr


def left_running(rank, size):
    """A user who forgets close() and destroys the group: the process still ends."""
    ddp = wrap(make_net())
    state = register(ddp, make_state("gtopk", 0.1))
    steps = parameter_buckets(state, ddp)
    for step in range(2):
        ddp.zero_grad()
        loss_of(ddp, Data(rank)(step)).backward()
    return len(steps)


def test_a_state_that_is_never_closed_does_not_hold_the_process():
    assert spawn_gloo(left_running, 2, timeout=60) == [3, 3]
