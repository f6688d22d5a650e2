"""Whole training runs under DDP on forked gloo ranks: conservation while training, and the dense limit."""

import threading

import pytest
import torch
from ddp_cases import (
    SCHEMES,
    Data,
    buckets_seen,
    by_name,
    gradients_of,
    local_gradients,
    loss_of,
    make_net,
    make_state,
    mean_over_ranks,
    memory_of,
    parameters_of,
    same_on_all_ranks,
    sparse_ddp,
    wrap,
)
from launch import spawn_gloo
from torch import nn

from commhooks import ErrorFeedback, ExponentialWarmup, SparseState, register, sparse_hook

RATE = 0.1
TIMEOUT = 150.0  # of a spawn; a busy machine takes long, a hang is found all the same


def check_identity(ddp, state, optimizer, batch, beta, rate, options=None):
    """One training step; asserts section 1's identity per element, with v_p computed beside DDP.

    ``w_{t+1} - eta mean_p u_{t+1} = w_t - eta mean_p (beta v_t + g + u_t)``
    """
    options = options or {}
    w, u = parameters_of(ddp), memory_of(ddp, state)
    v = memory_of(ddp, state, "velocity") if beta else torch.zeros_like(u)
    g = by_name(local_gradients(ddp, batch, **options))
    optimizer.zero_grad()
    loss = loss_of(ddp, batch, **options)
    loss.backward()
    update = gradients_of(ddp)
    optimizer.step()
    velocity = beta * v + g
    if beta:
        torch.testing.assert_close(memory_of(ddp, state, "velocity"), velocity, rtol=1e-5, atol=1e-6)
    left = parameters_of(ddp).double() - rate * mean_over_ranks(memory_of(ddp, state))
    right = w.double() - rate * mean_over_ranks(velocity + u)
    torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)
    assert same_on_all_ranks(update) and same_on_all_ranks(parameters_of(ddp))
    return loss.item(), update


def identity(rank, size, scheme, steps):
    ddp, state = sparse_ddp(scheme, 0.05, ErrorFeedback(0.9))
    seen = buckets_seen(state)
    optimizer, data = torch.optim.SGD(ddp.parameters(), lr=RATE / 10), Data(rank)
    losses, density = [], []
    for step in range(steps):
        loss, update = check_identity(ddp, state, optimizer, data(step % 4), 0.9, RATE / 10)
        losses.append(loss)
        density.append(float((update != 0).float().mean()))
    state.close()
    return losses, density, seen


@pytest.mark.parametrize(
    "scheme, size, steps", [("topk", 2, 50), ("gtopk", 3, 50), ("gtopk-tree", 3, 10), ("randomk", 2, 50)]
)
def test_the_identity_holds_over_50_steps_with_momentum_and_a_bucket_rebuild(scheme, size, steps):
    results = spawn_gloo(identity, size, args=(scheme, steps), timeout=TIMEOUT)
    for losses, density, seen in results:
        assert seen[0] != seen[1] and seen[1] == seen[-2]  # DDP laid its buckets anew after the first step
        assert len(seen[1]) == 4 and sorted(sum(seen[0], ())) == sorted(sum(seen[1], ()))
        assert sum(losses[-4:]) < sum(losses[:4])
        assert max(density) < 0.2 * (1 if scheme != "topk" else size)


def dense_limit(rank, size):
    curves = {}
    for name in ("plain", *SCHEMES):
        ddp = wrap(make_net())
        if name != "plain":
            state = register(ddp, make_state(name, 1.0))
        optimizer, data = torch.optim.SGD(ddp.parameters(), lr=RATE / 2, momentum=0.5), Data(rank)
        losses = []
        for step in range(12):
            optimizer.zero_grad()
            loss = loss_of(ddp, data(step % 3))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves[name] = losses, parameters_of(ddp)
        if name != "plain":
            assert memory_of(ddp, state).abs().max() == 0
            assert (state.stats()["bytes_sent"] > 0) == (size > 1)
            state.close()
    return curves


@pytest.mark.parametrize("size", [1, 2, 3])
def test_density_1_reproduces_plain_ddp_for_every_aggregator(size):
    for curves in spawn_gloo(dense_limit, size, timeout=TIMEOUT):
        losses, parameters = curves["plain"]
        assert losses[9] < losses[0]  # the same batch
        for name in SCHEMES:
            assert curves[name][0] == pytest.approx(losses, rel=2e-5), name
            torch.testing.assert_close(curves[name][1], parameters, rtol=1e-4, atol=1e-5)


def warm_up(rank, size):
    sent = {}
    for scheme in ("topk", "gtopk"):
        density = ExponentialWarmup(0.02, 6, start=1.0)
        ddp, state = sparse_ddp(scheme, density, dense_crossover=True)
        optimizer, data = torch.optim.SGD(ddp.parameters(), lr=RATE), Data(rank)
        sent[scheme] = []
        for step in range(10):
            check_identity(ddp, state, optimizer, data(step), 0.0, RATE)
            sent[scheme].append((state.stats()["bytes_sent"], state.stats()["residual_norm"]))
        state.close()
    return sent


def test_warm_up_with_the_dense_crossover_conserves_mass():
    for sent in spawn_gloo(warm_up, 3, timeout=TIMEOUT):
        for figures in sent.values():
            (first, norm_at_first), (last, norm_at_last) = figures[0], figures[-1]
            assert norm_at_first == 0.0 and norm_at_last > 0.0 and last < first / 5


class Announce(torch.autograd.Function):
    """Identity whose backward waits until the first message of this step has left (or 10 s have passed)."""

    sent = threading.Event()
    in_time: list[bool] = []

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        Announce.in_time.append(Announce.sent.wait(10.0))
        return grad


def overlap(rank, size):
    class Halfway(nn.Module):
        def __init__(self):
            super().__init__()
            self.below, self.above = nn.Linear(8, 30), nn.Linear(30, 30)

        def forward(self, x):
            return self.above(Announce.apply(torch.tanh(self.below(x))))

    torch.manual_seed(0)
    ddp = wrap(Halfway(), bucket_cap_mb=0.002)
    state = register(ddp, make_state("gtopk", 0.1))
    transport, seen = state.reducer.transport, buckets_seen(state)
    exchange = transport.move

    def noting(sends, receives, tag, what):
        exchange(sends, receives, tag, what)
        Announce.sent.set()

    transport.move = noting
    for step in range(4):
        Announce.sent.clear() if step else Announce.sent.set()  # DDP's first step has one bucket for everything
        ddp(torch.randn(4, 8)).square().sum().backward()
        ddp.zero_grad()
    state.close()
    return list(Announce.in_time), [len(buckets) for buckets in seen[:-1]]


def test_buckets_are_sent_before_backward_ends():
    """The original code waits for all gradients. Here backward itself waits for the first bucket's exchange."""
    for in_time, buckets in spawn_gloo(overlap, 2, timeout=TIMEOUT):
        assert in_time == [True] * 4 and min(buckets[1:]) >= 2


def returns_at_once(rank, size):
    """The hook's future is open while the exchange is held back, and the hook has returned."""
    ddp, state = sparse_ddp("topk", 0.1)
    loss_of(ddp, Data(rank)(0)).backward()  # DDP's first step has one bucket for everything
    ddp.zero_grad()
    release, order = threading.Event(), []
    reduce = state.reducer.reduce

    def held(bucket, scale=1.0):
        order.append("exchange")
        release.wait(10.0)
        reduce(bucket, scale)

    state.reducer.reduce = held
    submit = state.submit

    def noting(*arguments):
        future = submit(*arguments)
        order.append("returned")
        if arguments[-1]:
            order.append(f"done {future.done()}")
            release.set()
        return future

    state.submit = noting
    loss_of(ddp, Data(rank)(1)).backward()
    state.close()
    return order


def test_the_hook_returns_before_anything_is_exchanged():
    for order in spawn_gloo(returns_at_once, 2, timeout=TIMEOUT):
        returned = order.index("done False")
        assert order[:returned].count("returned") >= 3 and order[:returned].count("exchange") <= 1


def raw_and_registered(rank, size):
    outcomes = []
    for raw in (True, False):
        ddp = wrap(make_net())
        state = make_state("gtopk", 0.05, ErrorFeedback(0.5))
        if raw:
            ddp.register_comm_hook(state, sparse_hook)
        else:
            register(ddp, state)
        optimizer, data = torch.optim.SGD(ddp.parameters(), lr=RATE), Data(rank)
        for step in range(6):
            optimizer.zero_grad()
            loss_of(ddp, data(step)).backward()
            optimizer.step()
        if raw:
            with pytest.raises(ValueError, match="names.*register"):
                state.state_dict()
            state.set_names(ddp.module.named_parameters())
        outcomes.append((parameters_of(ddp), memory_of(ddp, state), state.stats()["bytes_sent"]))
        state.close()
    return outcomes


def test_raw_register_comm_hook_does_the_same_as_register():
    for raw, registered in spawn_gloo(raw_and_registered, 2, timeout=TIMEOUT):
        assert (
            torch.equal(raw[0], registered[0])
            and torch.equal(raw[1], registered[1])
            and raw[2] == registered[2]
        )


def short_forms(rank, size):
    names = {}
    for name in ("topk", "gtopk", "randomk", "dense"):
        state = (
            SparseState.dense()
            if name == "dense"
            else getattr(SparseState, name)(0.05, dense_crossover=False)
        )
        ddp = wrap(make_net())
        register(ddp, state)
        optimizer, data = torch.optim.SGD(ddp.parameters(), lr=RATE), Data(rank)
        for step in range(3):
            check_identity(ddp, state, optimizer, data(step), 0.0, RATE)
        names[name] = repr(state.reducer.aggregator), state.stats()
        state.close()
    return names


def test_the_short_forms_and_their_stats():
    names = spawn_gloo(short_forms, 2, timeout=TIMEOUT)[0]
    assert [names[n][0] for n in ("topk", "gtopk", "randomk", "dense")] == [
        "AllGather()",
        "GTopK(algorithm=doubling)",
        "SharedIndices()",
        "Dense()",
    ]
    for name, (_, stats) in names.items():
        assert stats["step"] == 3 and stats["dense_bytes"] == 4 * 724 and stats["bytes_sent"] > 0
        assert (stats["compression_ratio"] > 2) == (name != "dense")
        assert (stats["residual_norm"] > 0) == (name != "dense")
