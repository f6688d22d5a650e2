"""Rare and little: the model's change goes through a Reducer at each synchronisation."""

import pytest
import torch

from commhooks import AllGather, Dense, ErrorFeedback, GTopK, RandomK, Reducer, SharedIndices, TopK
from commhooks.averaging import BlockMomentum, LocalSGD, RestartedMomentum
from commhooks.errors import NonFiniteGradientError

from . import oracles
from .workers import NUMEL, Pieces, flat_momentum, in_ranks, run_steps, start

PERIOD, STEPS, RATE = 2, 8, 0.1


def reducer_for(scheme, transport, **options):
    if scheme == "dense":
        return Reducer(None, Dense(transport=transport), ErrorFeedback(), **options)
    if scheme == "randomk":
        selector, aggregator = RandomK(0.3, seed=5), SharedIndices(transport=transport)
    else:
        kind = {"topk": AllGather, "gtopk": GTopK}[scheme]
        selector, aggregator = TopK(0.3), kind(transport=transport)
    return Reducer(selector, aggregator, ErrorFeedback(), dense_crossover=False, **options)


def compressed_m_avg(x0, gradient, world_size, blocks, mu, keep):
    """M-AVG whose change w_p - w~ goes by per-worker top-k with error feedback (a combination of ours)."""
    w_tilde, v = x0.clone(), torch.zeros_like(x0)
    residual = [torch.zeros_like(x0) for _ in range(world_size)]
    for n in range(blocks):
        sent = torch.zeros_like(x0)
        for p in range(world_size):
            w = w_tilde.clone()
            for k in range(PERIOD):
                w = w - RATE * gradient(p, n * PERIOD + k, w)
            corrected = w - w_tilde + residual[p]
            mask = torch.zeros_like(corrected)
            mask[corrected.abs().topk(keep).indices] = 1.0
            residual[p] = (1 - mask) * corrected
            sent += mask * corrected
        v = mu * v + sent / world_size
        w_tilde = w_tilde + v
    return w_tilde


@pytest.mark.parametrize("world_size", (1, 2, 3, 4, 8))
@pytest.mark.parametrize("mu", (0.0, 0.7))
def test_block_momentum_over_topk_equals_its_simulation(world_size, mu):
    gradient = oracles.make_gradient(world_size, STEPS, NUMEL)

    def work(transport):
        model = Pieces(start(), dtype=torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        averager = BlockMomentum(
            mu, PERIOD, params=model.parameters(), transport=transport, reducer=reducer_for("topk", transport)
        )
        return run_steps(model, optimizer, averager, gradient, transport.rank, STEPS)

    expected = compressed_m_avg(start(), gradient, world_size, STEPS // PERIOD, mu, keep=3)
    result = in_ranks(world_size, work)
    for rank in range(world_size):
        torch.testing.assert_close(result[-1, rank], expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(result[-1, rank], result[-1, 0])


@pytest.mark.parametrize("kind", ("local", "block", "restarted"))
@pytest.mark.parametrize("world_size", (1, 3, 4))
def test_a_reducer_that_sends_everything_changes_nothing(kind, world_size):
    gradient = oracles.make_gradient(world_size, STEPS, NUMEL)

    def work(transport, with_reducer):
        model = Pieces(start(), dtype=torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
        options = {
            "transport": transport,
            "reducer": reducer_for("dense", transport) if with_reducer else None,
        }
        if kind == "local":
            averager = LocalSGD(PERIOD, params=model.parameters(), **options)
        elif kind == "block":
            averager = BlockMomentum(0.7, PERIOD, params=model.parameters(), **options)
        else:
            averager = RestartedMomentum(optimizer, PERIOD, **options)
        history = run_steps(model, optimizer, averager, gradient, transport.rank, STEPS)
        return torch.cat([history, flat_momentum(optimizer)[None]])

    plain = in_ranks(world_size, lambda t: work(t, False))
    reduced = in_ranks(world_size, lambda t: work(t, True))
    torch.testing.assert_close(reduced, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", ("topk", "gtopk", "randomk"))
@pytest.mark.parametrize("world_size", (2, 3, 4, 8))
def test_nothing_of_the_change_is_lost(scheme, world_size):
    """block + mean residual' = mean (w - w~) + mean residual, per element, at every synchronisation."""
    gradient = oracles.make_gradient(world_size, STEPS, NUMEL)

    def work(transport):
        model = Pieces(start(), dtype=torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        reducer = reducer_for(scheme, transport)
        averager = BlockMomentum(0.5, PERIOD, params=model.parameters(), transport=transport, reducer=reducer)
        rows = []
        for t in range(STEPS):
            anchor, velocity = averager.anchor.clone(), averager.velocity.clone()
            before = residual(reducer)
            model.set_gradient(gradient(transport.rank, t, model.flat()))
            optimizer.step()
            change = model.flat() - anchor.double()
            averager.average_parameters(model.parameters())
            if (t + 1) % PERIOD == 0:
                block = averager.velocity - 0.5 * velocity
                rows.append(torch.stack([change, before, residual(reducer), block.double()]))
        return torch.stack(rows)

    change, before, after, block = in_ranks(world_size, work).mean(dim=1).unbind(dim=1)
    torch.testing.assert_close(block + after, change + before, rtol=1e-4, atol=1e-5)
    assert after.abs().max() > 1e-3


def residual(reducer):
    state = reducer.state_dict()["residual"]
    if not state:
        return torch.zeros(NUMEL, dtype=torch.float64)
    return torch.cat([state["parameter 0"], state["parameter 1"]]).double()


def test_momentum_buffers_are_compressed_with_a_memory_of_their_own():
    gradient = oracles.make_gradient(4, STEPS, NUMEL)

    def work(transport):
        model = Pieces(start(), dtype=torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
        averager = RestartedMomentum(
            optimizer, PERIOD, transport=transport, reducer=reducer_for("topk", transport)
        )
        history = run_steps(model, optimizer, averager, gradient, transport.rank, STEPS)
        names = set(averager.reducer.state_dict()["residual"])
        assert names == {"parameter 0", "parameter 1", "momentum 0", "momentum 1"}
        return torch.stack([history[-1], flat_momentum(optimizer)])

    result = in_ranks(4, work)
    for rank in range(1, 4):
        assert torch.equal(result[:, 0], result[:, rank])


def test_fewer_bytes_travel_and_training_still_converges():
    numel, world_size = 2000, 4
    target = torch.randn(numel, generator=torch.Generator().manual_seed(2))

    def work(transport, density):
        parameter = torch.nn.Parameter(torch.zeros(numel))
        optimizer = torch.optim.SGD([parameter], lr=0.01)
        reducer = None
        if density:
            reducer = Reducer(TopK(density), GTopK(transport=transport), ErrorFeedback())
        averager = BlockMomentum(0.0, 4, params=[parameter], transport=transport, reducer=reducer)
        noise = torch.Generator().manual_seed(transport.rank)
        before = transport.counters.bytes_sent
        for _ in range(400):
            parameter.grad = parameter.detach() - target + 0.1 * torch.randn(numel, generator=noise)
            optimizer.step()
            averager.average_parameters([parameter])
        return torch.tensor(
            [float((parameter.detach() - target).norm()), transport.counters.bytes_sent - before]
        )

    dense, sparse = (in_ranks(world_size, lambda t, d=d: work(t, d))[:, 0] for d in (None, 0.05))
    assert sparse[1] < dense[1] / 5
    assert sparse[0] < 0.1 * target.norm() and dense[0] < 0.1 * target.norm()


def test_weights_and_a_reducer_do_not_go_together():
    def work(transport):
        model = Pieces(start(), dtype=torch.float32)
        averager = LocalSGD(
            1,
            weight=1.0 + transport.rank,
            params=model.parameters(),
            transport=transport,
            reducer=reducer_for("topk", transport),
        )
        averager.average_parameters(model.parameters())

    with pytest.raises(ValueError, match=r"weight must be equal.*\[1.0, 2.0\]"):
        in_ranks(2, work)


def test_a_change_with_inf_is_skipped_on_all_ranks_if_the_reducer_says_so():
    def work(transport):
        model = Pieces(start(), dtype=torch.float32)
        before = model.flat()
        reducer = Reducer(
            TopK(0.3),
            AllGather(transport=transport),
            ErrorFeedback(),
            nonfinite="skip",
            dense_crossover=False,
        )
        averager = LocalSGD(1, params=model.parameters(), transport=transport, reducer=reducer)
        if transport.rank == 1:
            with torch.no_grad():
                model.parts[0][0, 0] = float("inf")
        averager.average_parameters(model.parameters())
        return model.flat() - before

    assert in_ranks(2, work).abs().max() == 0


@pytest.mark.parametrize("policy", ("propagate", "skip", "error"))
@pytest.mark.parametrize("bad", ("momentum", "parameter"))
def test_inf_in_one_group_leaves_the_other_with_all_its_mass(bad, policy):
    """mean x + mean residual stays, x the parameters or the momenta; what was sent goes back or arrives, not
    both.
    """

    def work(transport):
        model = Pieces(start(), dtype=torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
        reducer = reducer_for("topk", transport, nonfinite=policy)
        averager = RestartedMomentum(optimizer, PERIOD, transport=transport, reducer=reducer)
        run_steps(model, optimizer, averager, gradient, transport.rank, 2 * PERIOD)

        def mass():
            x = flat_momentum(optimizer) if bad == "parameter" else model.flat()
            kind = "momentum" if bad == "parameter" else "parameter"
            saved = reducer.state_dict()["residual"]
            return x + torch.cat([saved[f"{kind} 0"], saved[f"{kind} 1"]]).double()

        run_steps(model, optimizer, averager, gradient, transport.rank, PERIOD - 1, first=2 * PERIOD)
        before = mass()
        victim = model.parts[0].detach()
        if bad == "momentum":
            victim = optimizer.state[model.parts[0]]["momentum_buffer"]
        if transport.rank == 1:
            victim[0, 0] = float("inf")
        try:
            averager.synchronise(model.parameters())
            assert policy != "error"
        except NonFiniteGradientError:
            assert policy == "error"
        finite = victim.isfinite().all()
        assert finite == (policy == "skip" or (policy == "error" and transport.rank == 0))
        return torch.stack([before, mass()])

    gradient = oracles.make_gradient(2, 3 * PERIOD, NUMEL)
    before, after = in_ranks(2, work).mean(dim=1)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ("local", "block", "restarted"))
def test_parameter_groups_in_another_order_than_the_model_change_nothing(kind):
    gradient = oracles.make_gradient(2, STEPS, NUMEL)

    def work(transport, split, broadcast=False):
        model = Pieces(start(), dtype=torch.float32)
        first, second = model.parts
        given = [{"params": [second]}, {"params": [first]}] if split else [first, second]
        optimizer = torch.optim.SGD(given, lr=RATE, momentum=0.9)
        options = {"transport": transport, "reducer": reducer_for("topk", transport)}
        if kind == "local":
            averager = LocalSGD(PERIOD, params=optimizer.param_groups, **options)
        elif kind == "block":
            averager = BlockMomentum(0.7, PERIOD, params=optimizer.param_groups, **options)
        else:
            averager = RestartedMomentum(optimizer, PERIOD, **options)
        if broadcast:
            averager.broadcast_parameters(model.parameters())
        return run_steps(model, optimizer, averager, gradient, transport.rank, STEPS)

    expected = in_ranks(2, lambda t: work(t, False))
    for broadcast in (False, True):
        result = in_ranks(2, lambda t, b=broadcast: work(t, True, b))
        torch.testing.assert_close(result, expected)
