"""Synchronisation sets, suggested periods, learning rates and output averages against their formulas."""

import math

import pytest
import torch

from commhooks.averaging import (
    AtSteps,
    ConvexLR,
    Every,
    Growing,
    LastHalf,
    LocalSGDLR,
    NonConvexLR,
    OneShot,
    OutputAverage,
    PostLocal,
    PowerLR,
    Quadratic,
    StronglyConvexLR,
    Uniform,
    suggest_period,
    suggest_restart_period,
    suggest_shift,
)
from commhooks.averaging.sync_sets import as_sync_set
from commhooks.transports import in_process

from .workers import Pieces, start


def steps_of(sync, total=40):
    return [t for t in range(total + 1) if t in sync]


def test_members_of_each_set():
    assert steps_of(Every(8)) == [8, 16, 24, 32, 40]
    assert steps_of(Every(8, start=5, total_steps=39)) == [13, 21, 29, 37, 39]
    assert steps_of(AtSteps([3, 1, 40])) == [1, 3, 40]
    assert steps_of(OneShot(37)) == [37]
    assert steps_of(PostLocal(3, Every(10))) == [1, 2, 3, 13, 23, 33]
    assert steps_of(Growing(first=1, maximum=8)) == [1, 3, 7, 15, 23, 31, 39]
    assert steps_of(Growing(first=2, maximum=5, factor=1.5, total_steps=40)) == [
        2,
        5,
        9,
        14,
        19,
        24,
        29,
        34,
        39,
        40,
    ]
    assert 0 not in Every(1) and "8" not in Every(8)
    assert repr(AtSteps([5, 4])) == "AtSteps([4, 5])"


def test_growing_sets_answer_for_late_steps_at_once():
    sync = Growing(first=1, maximum=1000)
    late = 10**9
    assert sum((late + i) in sync for i in range(1000)) == 1


def test_the_gap_counts_from_zero_and_up_to_the_end():
    assert Every(8).gap(40) == 8
    assert Every(8).gap(42) == 8
    assert OneShot(40).gap(40) == 40
    assert AtSteps([30, 40]).gap(40) == 30
    assert AtSteps([10]).gap(40) == 30


def test_suggested_periods():
    assert suggest_period(10_000, 4) == 50
    assert suggest_period(10_000, 4, batch_size=25) == 10
    assert suggest_period(10, 100) == 1
    assert suggest_restart_period(10_000, 4) == 12
    assert suggest_restart_period(10_000, 4, iid=False) == 3
    assert suggest_shift(10.0, 50) == 160.0 and suggest_shift(2.0, 50) == 50.0


@pytest.mark.parametrize(
    ("make", "shown"),
    [
        (lambda: Every(0), "period.*0"),
        (lambda: Every(True), "period.*True"),
        (lambda: Every(4, start=-1), "start.*-1"),
        (lambda: AtSteps([]), "steps"),
        (lambda: AtSteps([0]), "steps.*0"),
        (lambda: OneShot(-3), "total_steps.*-3"),
        (lambda: Growing(4, 2), "maximum.*2"),
        (lambda: Growing(1, 2, factor=1.0), "factor.*1.0"),
        (lambda: PostLocal(2, 8), "then.*8"),
        (lambda: as_sync_set("often"), "period.*often"),
        (lambda: as_sync_set(0), "period.*0"),
        (lambda: as_sync_set(2.5), "period.*2.5"),
        (lambda: suggest_period(100, 0), "world_size.*0"),
        (lambda: suggest_period(100, 2, scale=0.0), "scale.*0"),
        (lambda: suggest_restart_period(0, 2), "total_steps.*0"),
        (lambda: suggest_shift(0.5, 2), "condition_number.*0.5"),
        (lambda: Quadratic(0.0), "shift.*0"),
        (lambda: LastHalf(0), "total_steps.*0"),
    ],
)
def test_bad_values_are_named(make, shown):
    with pytest.raises(ValueError, match=shown):
        make()


def rates(make, steps=6):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=123.0)
    scheduler = make(optimizer)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_learning_rates_of_the_theorems():
    beta, mu, a = 0.9, 0.25, 40.0
    assert rates(lambda o: LocalSGDLR(o, mu, a)) == [4 / (mu * (a + t)) for t in range(6)]
    assert rates(lambda o: StronglyConvexLR(o, mu, beta)) == pytest.approx(
        [(1 - beta * t / (t + 1)) / (mu * t) for t in range(1, 7)], rel=1e-15
    )
    assert rates(lambda o: ConvexLR(o, beta)) == pytest.approx(
        [(1 - beta * math.sqrt(t + 1) / math.sqrt(t + 2)) / math.sqrt(t + 1) for t in range(6)], rel=1e-15
    )
    assert rates(lambda o: NonConvexLR(o, 400, scale=2.0)) == [0.1] * 6
    assert rates(lambda o: PowerLR(o, 0.75, beta, scale=3.0)) == pytest.approx(
        [3 * (t**-0.75 - beta * (t + 1) ** -0.75) for t in range(1, 7)], rel=1e-15
    )


def test_rates_fit_the_transformation_of_lemma_6():
    """beta rho_t = beta eta_t + rho_{t-1} with the theorems' rho_t and the second strategy's, corrected."""
    beta, mu = 0.9, 0.25
    eta = rates(lambda o: StronglyConvexLR(o, mu, beta))
    rho = [-beta / (mu * (t + 1)) for t in range(7)]
    for t in range(1, 7):
        assert beta * rho[t] == pytest.approx(beta * eta[t - 1] + rho[t - 1])
    eta = rates(lambda o: ConvexLR(o, beta))
    rho = [-beta / math.sqrt(t + 2) for t in range(-1, 6)]
    for t in range(6):
        assert beta * rho[t + 1] == pytest.approx(beta * eta[t] + rho[t])
    eta = rates(lambda o: PowerLR(o, 0.5, beta))
    rho = [-beta / math.sqrt(t + 1) for t in range(7)]
    for t in range(1, 7):
        assert beta * rho[t] == pytest.approx(beta * eta[t - 1] + rho[t - 1])
        assert eta[t - 1] - rho[t] == pytest.approx(1 / math.sqrt(t))


def test_schedulers_resume():
    def make():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        return optimizer, LocalSGDLR(optimizer, 1.0, 16.0)

    optimizer, scheduler = make()
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    state = scheduler.state_dict()
    resumed, second = make()
    second.load_state_dict(state)
    resumed.step()
    second.step()
    assert resumed.param_groups[0]["lr"] == 4.0 / 20.0


@pytest.mark.parametrize(
    ("make", "shown"),
    [
        (lambda o: LocalSGDLR(o, 0.0, 1.0), "strong_convexity.*0"),
        (lambda o: LocalSGDLR(o, 1.0, -1.0), "shift.*-1"),
        (lambda o: StronglyConvexLR(o, 1.0, beta=1.0), "beta.*1"),
        (lambda o: PowerLR(o, alpha=0.4), "alpha.*0.4"),
        (lambda o: NonConvexLR(o, 0), "total_steps.*0"),
        (lambda o: ConvexLR(o, scale=math.inf), "scale.*inf"),
    ],
)
def test_bad_rates_are_named(make, shown):
    with pytest.raises(ValueError, match=shown):
        rates(make)


@pytest.mark.parametrize("weights", (Quadratic(5.0), Uniform(), LastHalf(7)))
def test_output_average_is_the_weighted_mean_over_workers_and_steps(weights):
    total, world_size = 7, 3
    iterates = torch.randn(
        world_size, total + 1, 10, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    w = torch.tensor([weights(t) for t in range(total)], dtype=torch.float64)
    expected = (w[:, None] * iterates[:, :total].mean(dim=0)).sum(dim=0) / w.sum()

    def work(transport):
        model = Pieces(iterates[transport.rank, 0])
        output = OutputAverage(model.parameters(), weights)
        for t in range(total):
            output.update()
            if t == 3:  # saved and loaded on the way
                state = output.state_dict()
                output = OutputAverage(model.parameters(), weights)
                output.load_state_dict(state)
            with torch.no_grad():
                for p, part in zip(model.parts, iterates[transport.rank, t + 1].split([6, 4]), strict=True):
                    p.copy_(part.reshape(p.shape))
        with output.applied(transport):
            inside = model.flat()
        assert torch.equal(model.flat(), iterates[transport.rank, total])
        torch.testing.assert_close(output.result(transport), inside, rtol=0, atol=0)
        return inside

    for row in in_process.run(world_size, work):
        torch.testing.assert_close(row, expected, rtol=1e-12, atol=1e-12)


def test_the_sum_of_quadratic_weights_is_the_papers():
    a, total = 17.0, 50
    s = total / 6 * (2 * total**2 + 6 * a * total - 3 * total + 6 * a**2 - 6 * a + 1)
    assert sum(Quadratic(a)(t) for t in range(total)) == pytest.approx(s) and s >= total**3 / 3


def test_output_average_without_iterates_or_with_bad_weights():
    model = Pieces(start())
    with pytest.raises(ValueError, match="update"):
        OutputAverage(model.parameters(), Uniform()).result()
    with pytest.raises(ValueError, match="step 0.*-1"):
        OutputAverage(model.parameters(), lambda t: -1.0).update()
