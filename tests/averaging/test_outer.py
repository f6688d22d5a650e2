"""Outer optimizers: DiLoCo and SlowMo against their pseudocode, and M-AVG where they must be equal."""

import copy

import pytest
import torch

from commhooks import AllGather, ErrorFeedback, Reducer, TopK
from commhooks.averaging import (
    AtSteps,
    AveragedOptimizer,
    BlockMomentum,
    DiLoCo,
    Every,
    Growing,
    OneShot,
    PostLocal,
    SlowMo,
)
from commhooks.errors import SettingsMismatchError
from commhooks.transports import in_process

from . import oracles
from .workers import NUMEL, Pieces, in_ranks, run_steps, start

SIZES = (1, 2, 3, 4, 5)
STEPS, RATE = 12, 0.1
SETS = {
    3: {3, 6, 9, 12},
    AtSteps((1, 2, 7, 12)): {1, 2, 7, 12},
    Growing(first=1, maximum=4, total_steps=12): {1, 3, 7, 11, 12},
    Every(5, total_steps=12): {5, 10, 12},
    OneShot(12): {12},
    PostLocal(2, Every(5)): {1, 2, 7, 12},
}


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def nesterov(params):
    return torch.optim.SGD(params, lr=0.7, momentum=0.9, nesterov=True)


@pytest.mark.parametrize("world_size", SIZES)
@pytest.mark.parametrize("sync", SETS, ids=repr)
def test_diloco(world_size, sync):
    gradient = oracles.make_gradient(world_size, STEPS, NUMEL)

    def work(transport):
        model = Pieces(start())
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        outer = nesterov(model.parameters())
        averager = DiLoCo(model.parameters(), outer, sync_every=sync, transport=transport)
        return run_steps(model, optimizer, averager, gradient, transport.rank, STEPS)

    expected = oracles.blocks_with(
        start(), gradient, world_size, STEPS, lambda t: RATE, SETS[sync], oracles.nesterov_outer(0.7, 0.9)
    )
    same(in_ranks(world_size, work), expected)


@pytest.mark.parametrize("world_size", SIZES)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
@pytest.mark.parametrize("compressed", (False, True))
def test_diloco_with_heavy_ball_at_rate_1_is_m_avg_bit_for_bit(world_size, dtype, compressed):
    gradient = oracles.make_gradient(world_size, STEPS, NUMEL)

    def work(transport, kind):
        model = Pieces(start(), dtype=dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        options = {"transport": transport}
        if compressed:
            aggregator = AllGather(transport=transport)
            options["reducer"] = Reducer(TopK(0.3), aggregator, ErrorFeedback(), dense_crossover=False)
        if kind == "block":
            averager = BlockMomentum(0.7, 3, params=model.parameters(), **options)
        else:
            outer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.7)
            averager = DiLoCo(model.parameters(), outer, sync_every=3, **options)
        return run_steps(model, optimizer, averager, gradient, transport.rank, STEPS)

    assert torch.equal(
        in_ranks(world_size, lambda t: work(t, "block")), in_ranks(world_size, lambda t: work(t, "diloco"))
    )


@pytest.mark.parametrize("world_size", SIZES)
def test_diloco_with_nesterov_is_bmuf_with_nesterov_block_momentum(world_size):
    period, eta, zeta = 3, 0.8, 0.9
    gradient = oracles.make_gradient(world_size, STEPS, NUMEL)
    starts = oracles.nesterov_block_momentum(start(), gradient, world_size, STEPS, RATE, period, eta, zeta)

    def work(transport):
        model = Pieces(start())
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        outer = torch.optim.SGD(model.parameters(), lr=zeta, momentum=eta, nesterov=True)
        averager = DiLoCo(model.parameters(), outer, sync_every=period, transport=transport)
        return run_steps(model, optimizer, averager, gradient, transport.rank, STEPS)

    result = in_ranks(world_size, work)
    for rank in range(world_size):
        same(result[::period, rank], torch.stack(starts))


OUTER = {
    "adam": lambda params: torch.optim.Adam(params, lr=0.05),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.05, weight_decay=0.1),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1),
    "sgd with decay and dampening": lambda params: torch.optim.SGD(
        params, lr=0.5, momentum=0.5, dampening=0.1, weight_decay=0.01
    ),
}


@pytest.mark.parametrize("kind", OUTER)
@pytest.mark.parametrize("form", ("optimizer", "function"))
def test_any_torch_optimizer_is_an_outer_one_with_schedulers(kind, form):
    world_size = 3
    gradient = oracles.make_gradient(world_size, STEPS, NUMEL)

    def work(transport):
        model = Pieces(start())
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        outer = OUTER[kind](model.parameters()) if form == "optimizer" else OUTER[kind]
        averager = DiLoCo(model.parameters(), outer, sync_every=3, transport=transport)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(averager.outer_optimizer, 0.5)
        averager.outer_optimizer.register_step_post_hook(lambda *_: scheduler.step())
        for p in model.parameters():
            p.requires_grad_(True)
        history = run_steps(model, optimizer, averager, gradient, transport.rank, STEPS)
        assert all(p.grad is not None for p in model.parameters())  # the inner gradients are untouched
        return history

    parameter = torch.nn.Parameter(start())
    outer = OUTER[kind]([parameter])

    def outer_step(t, w_tilde, delta):
        assert torch.equal(parameter, w_tilde)
        parameter.grad = delta
        outer.step()
        outer.param_groups[0]["lr"] *= 0.5
        return parameter.detach().clone()

    expected = oracles.blocks_with(
        start(), gradient, world_size, STEPS, lambda t: RATE, {3, 6, 9, 12}, outer_step
    )
    same(in_ranks(world_size, work), expected)


@pytest.mark.parametrize("world_size", SIZES)
def test_slowmo(world_size):
    """With rates that change by step and differ by group; where they stay it is DiLoCo's heavy ball."""
    gradient = oracles.make_gradient(world_size, STEPS, NUMEL)
    scale = torch.tensor([1.0] * 6 + [0.5] * 4, dtype=torch.float64)

    def work(transport, decays, kind="slowmo"):
        model = Pieces(start())
        groups = [{"params": [part], "lr": RATE * s} for part, s in zip(model.parts, (1.0, 0.5), strict=True)]
        optimizer = torch.optim.SGD(groups)
        if kind == "slowmo":
            averager = SlowMo(optimizer, 0.6, 3, alpha=0.8, transport=transport)
        else:
            outer = torch.optim.SGD(model.parameters(), lr=0.8, momentum=0.6)
            averager = DiLoCo(model.parameters(), outer, sync_every=3, transport=transport)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9 if decays else 1.0)
        history = [model.flat()]
        for t in range(STEPS):
            history.append(run_steps(model, optimizer, averager, gradient, transport.rank, 1, first=t)[-1])
            scheduler.step()
        return torch.stack(history)

    def rate(t):
        return RATE * scale * 0.9**t

    expected = oracles.blocks_with(
        start(), gradient, world_size, STEPS, rate, {3, 6, 9, 12}, oracles.slowmo_outer(rate, 0.8, 0.6)
    )
    same(in_ranks(world_size, lambda t: work(t, True)), expected)
    same(
        in_ranks(world_size, lambda t: work(t, False)),
        in_ranks(world_size, lambda t: work(t, False, "diloco")),
    )


def test_slowmo_where_a_rate_is_0():
    def work(transport):
        params = [torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))]
        optimizer = torch.optim.SGD([{"params": params[:1]}, {"params": params[1:], "lr": 0.0}], lr=1.0)
        averager = SlowMo(optimizer, 0.5, 1, transport=transport)
        for _ in range(3):
            with torch.no_grad():
                for p in params:
                    p.add_(1.0 + transport.rank)
            averager.average_parameters(params)
        return torch.cat([p.detach() for p in params])

    assert in_ranks(2, work)[:, 0].tolist() == [1.5 + 2.25 + 2.625, 4.5]


def compressed_diloco(x0, gradient, world_size, sync, lr, momentum, keep):
    """``e_p = e_p + Delta_p; send the keep largest; Delta = mean over all workers of what was sent``
    (SparseLoCo's scheme with decay 1), then Nesterov.
    """
    outer, residual = oracles.nesterov_outer(lr, momentum), [torch.zeros_like(x0) for _ in range(world_size)]
    w_tilde = x0.clone()
    w = [x0.clone() for _ in range(world_size)]
    for t in range(STEPS):
        w = [w[p] - RATE * gradient(p, t, w[p]) for p in range(world_size)]
        if t + 1 in sync:
            sent = torch.zeros_like(x0)
            for p in range(world_size):
                corrected = residual[p] + w_tilde - w[p]
                mask = torch.zeros_like(corrected)
                mask[corrected.abs().topk(keep).indices] = 1.0
                residual[p] = (1 - mask) * corrected
                sent += mask * corrected
            w_tilde = outer(t, w_tilde, sent / world_size)
            w = [w_tilde.clone() for _ in range(world_size)]
    return w_tilde, sum(residual) / world_size


@pytest.mark.parametrize("world_size", SIZES)
@pytest.mark.parametrize("lr", (1.0, 0.7))
def test_compressed_diloco_equals_its_simulation(world_size, lr):
    """At an outer rate below 1 too: the rate enters once, and the mean is over all workers."""
    gradient = oracles.make_gradient(world_size, STEPS, NUMEL)

    def work(transport):
        model = Pieces(start(), dtype=torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        reducer = Reducer(TopK(0.3), AllGather(transport=transport), ErrorFeedback(), dense_crossover=False)
        outer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.5, nesterov=True)
        averager = DiLoCo(model.parameters(), outer, sync_every=3, transport=transport, reducer=reducer)
        run_steps(model, optimizer, averager, gradient, transport.rank, STEPS)
        state = reducer.state_dict()["residual"]
        residual = -torch.cat([state["parameter 0"], state["parameter 1"]]).double()
        return torch.stack([model.flat(), residual])

    expected, residual = compressed_diloco(start(), gradient, world_size, {3, 6, 9, 12}, lr, 0.5, keep=3)
    result = in_ranks(world_size, work)
    for rank in range(world_size):
        assert torch.equal(result[0, rank], result[0, 0])
        torch.testing.assert_close(result[0, rank], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result[1].mean(dim=0), residual, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ("context", "wrapper"))
def test_the_inner_step_averages_by_itself(form):
    gradient = oracles.make_gradient(2, STEPS, NUMEL)

    def work(transport):
        model = Pieces(start())
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        diloco = DiLoCo(
            model.parameters(),
            nesterov(model.parameters()),
            sync_every=3,
            inner_optimizer=optimizer,
            transport=transport,
        )
        if form == "context":
            with diloco as entered:
                assert entered is diloco
                history = loop(model, optimizer, transport.rank)
            model.set_gradient(torch.ones(NUMEL, dtype=torch.float64))
            optimizer.step()
            assert diloco.step == STEPS
        else:
            history = loop(model, AveragedOptimizer(optimizer, diloco), transport.rank)
        return history

    def loop(model, optimizer, rank):
        history = [model.flat()]
        for t in range(STEPS):
            model.set_gradient(gradient(rank, t, model.flat()))
            optimizer.step()
            history.append(model.flat())
        return torch.stack(history)

    expected = oracles.blocks_with(
        start(), gradient, 2, STEPS, lambda t: RATE, {3, 6, 9, 12}, oracles.nesterov_outer(0.7, 0.9)
    )
    same(in_ranks(2, work), expected)


def test_a_half_precision_model_has_a_float32_one_behind_it():
    """Outer steps far below the parameters' last bit add up."""

    def work(transport):
        parameter = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        outer = torch.optim.SGD([parameter], lr=1e-3)
        averager = DiLoCo([parameter], outer, sync_every=1, transport=transport)
        for _ in range(100):
            with torch.no_grad():
                parameter.add_(0.25)
            averager.average_parameters([parameter])
        return averager.anchor

    torch.testing.assert_close(in_ranks(2, work)[:, 0], torch.full((4,), 1.025), rtol=1e-3, atol=1e-3)


def test_the_outer_optimizers_state_goes_along():
    """State made before, its own state_dict, and a parameter it lacks."""
    transport = in_process.group(1)[0]
    model = Pieces(start())
    outer = nesterov(model.parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
        outer.state[p]["momentum_buffer"] = torch.ones_like(p)
    averager = DiLoCo(model.parameters(), outer, sync_every=1, transport=transport)
    assert averager.outer_optimizer is outer
    averager.average_parameters(model.parameters())
    same(start() - model.flat(), torch.full((NUMEL,), 0.7 * 0.9 * 0.9, dtype=torch.float64))
    again = nesterov(model.parameters())
    again.load_state_dict(copy.deepcopy(outer.state_dict()))
    assert all((s["momentum_buffer"] - 0.9).abs().max() < 1e-12 for s in again.state.values())
    saved = averager.state_dict()
    for _ in range(2):  # a state that is kept in memory, and loaded twice, stays as it was
        averager.average_parameters(model.parameters())
        assert all(
            (s["momentum_buffer"] - 0.9).abs().max() < 1e-12
            for s in saved["shared"]["outer"]["state"].values()
        )
        averager.load_state_dict(saved)
    assert all((s["momentum_buffer"] - 0.9).abs().max() < 1e-12 for s in outer.state.values())
    with pytest.raises(ValueError, match=r"outer_optimizer must hold.*lacks 1.*\(4,\)"):
        DiLoCo(model.parameters(), nesterov([model.parts[0]]), sync_every=1, transport=transport)
    with pytest.raises(ValueError, match="sync_every|period.*0"):
        DiLoCo(model.parameters(), nesterov, sync_every=0, transport=transport)
    with pytest.raises(ValueError, match="inner_optimizer"), averager:
        pass
    with pytest.raises(ValueError, match="alpha.*0"):
        SlowMo(torch.optim.SGD(model.parameters(), lr=1.0), 0.5, 1, alpha=0.0, transport=transport)
    with pytest.raises(ValueError, match="beta.*1.0"):
        SlowMo(torch.optim.SGD(model.parameters(), lr=1.0), 1.0, 1, transport=transport)


@pytest.mark.parametrize("kind", ("diloco", "slowmo"))
def test_rates_that_differ_between_ranks_are_told(kind):
    """Each rank moves w~ by itself: another rate would part the ranks in silence."""

    def work(transport):
        model = Pieces(start())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if kind == "slowmo":
            averager = SlowMo(optimizer, 0.5, 1, transport=transport)
            optimizer.param_groups[0]["lr"] = 0.1 + transport.rank
        else:
            outer = torch.optim.SGD(model.parameters(), lr=0.7 + transport.rank)
            averager = DiLoCo(model.parameters(), outer, sync_every=1, transport=transport)
        averager.average_parameters(model.parameters())

    with pytest.raises(SettingsMismatchError, match=r"disagree on (outer|inner) rates: \[[\d.]+\] here"):
        in_process.run(2, work)


def test_print_is_readable():
    model = Pieces(start())
    transport = in_process.group(1)[0]
    assert repr(DiLoCo(model.parameters(), nesterov, sync_every=30, transport=transport)) == (
        "<DiLoCo(outer_optimizer=SGD(momentum=0.9, nesterov=True), sync_every=30, compressed=False): "
        "rank 0 of 1, step 0, 0 synchronisations>"
    )
