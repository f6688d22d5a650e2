"""M-AVG's bound against its formula, and its lemmas held against the bound."""

import itertools

import pytest

from commhooks.averaging import MAvgProblem, suggest_block_period, suggest_mu

EXAMPLE = MAvgProblem(
    smoothness=10.0,
    variance=1.0,
    gradient_bound=1.0,
    gap=2.0,
    rate=0.001,
    batch_size=32,
    world_size=4,
    total_steps=10_000,
)


def problems():
    """64 sets of constants, rates and sizes."""
    grid = itertools.product(
        (1.0, 10.0), (0.1, 10.0), (0.1, 1.0), (5.0,), (0.001, 0.01), (1, 32), (4, 16), (1000,)
    )
    return [MAvgProblem(*values) for values in grid]


def test_the_bound_is_equation_3():
    """Written out with the paper's letters, for mu = 0.5, K = 4, delta = 0.3."""
    L, s2, M, F, eta, B, P, S = 10.0, 1.0, 1.0, 2.0, 0.001, 32, 4, 10_000
    mu, K, d = 0.5, 4, 0.3
    N = S / K
    expected = 2 * (1 - mu) * F / (N * (K - 1 + d) * eta)
    expected += L**2 * eta**2 * s2 * (2 * K - 1) * K * (K - 1) / (6 * (K - 1 + d) * B * (1 - mu) ** 2)
    expected += 2 * L * K**2 * s2 * eta / (P * B * (K - 1 + d) * (1 - mu)) * (1 + mu**2 / (2 * (1 - mu) ** 2))
    expected += L * eta * mu**2 * K**2 * M / ((K - 1 + d) * (1 - mu) ** 3)
    assert EXAMPLE.bound(mu, K, d) == pytest.approx(expected, rel=1e-14)
    assert EXAMPLE.bound(mu, K) < expected  # the largest delta gives the least bound


def test_condition_11_is_where_the_bound_of_two_steps_is_below_that_of_one():
    """Both ways, on every problem: so it implies Lemma 5 (K_opt > 1); and Lemma 7 (momentum lowers K_opt)
    holds too.
    """
    outcomes = set()
    for problem, mu, delta in itertools.product(problems(), (0.0, 0.5, 0.7), (None, 0.05, 0.3)):
        if not problem.allows(mu, 2) or (delta or 0.0) > problem.largest_delta(mu):
            continue
        left, right = problem.condition_11(mu, delta)
        holds = left > right
        assert holds == (problem.bound(mu, 2, delta) < problem.bound(mu, 1, delta))
        outcomes.add(holds)
        if holds:
            advice = suggest_block_period(problem, mu, delta)
            assert advice.period > 1 and advice.condition_11 == (left, right)
            assert advice.period <= suggest_block_period(problem, 0.0, delta).period
    assert outcomes == {True, False}


def test_more_workers_want_a_larger_mu():
    """Lemma 6, at an equal number of samples."""
    grew = 0
    for problem, period in itertools.product(problems(), (2, 8)):
        if problem.allows(0.0, period):
            few, many = suggest_mu(problem, period), suggest_mu(problem.on(2 * problem.world_size), period)
            assert many.mu >= few.mu
            grew += many.mu > few.mu
    assert grew > 40
    assert EXAMPLE.on(8).total_steps == 5000


def test_suggestions_are_the_minimum_and_inside_the_theorem():
    advice = suggest_mu(EXAMPLE, 8)
    assert EXAMPLE.allows(advice.mu, 8)
    for mu in (advice.mu - 0.05, advice.mu + 0.05):
        assert EXAMPLE.bound(mu, 8) > advice.bound
    assert advice.plain == EXAMPLE.bound(0.0, 1)
    far = MAvgProblem(1.0, 0.0, 1.0, 100.0, 0.001, 1, 4, 1000)
    advice = suggest_block_period(far, 0.0, delta=0.05)
    assert advice.period > 1 and far.allows(0.0, advice.period)
    for period in (advice.period - 1, advice.period + 1):
        assert not far.allows(0.0, period) or far.bound(0.0, period, 0.05) >= advice.bound
    assert "period" in str(advice) and "condition (11)" in str(advice)


@pytest.mark.parametrize(
    ("make", "shown"),
    [
        (lambda: MAvgProblem(0.0, 1.0, 1.0, 1.0, 0.1, 1, 1, 1), "smoothness.*0.0"),
        (lambda: MAvgProblem(1.0, -1.0, 1.0, 1.0, 0.1, 1, 1, 1), "variance.*-1.0"),
        (lambda: MAvgProblem(1.0, 1.0, 1.0, 1.0, 0.1, 0, 1, 1), "batch_size.*0"),
        (lambda: suggest_block_period(EXAMPLE, 1.0), "mu.*1.0"),
        (lambda: suggest_mu(EXAMPLE, 0), "period.*0"),
        (
            lambda: suggest_block_period(MAvgProblem(10.0, 1.0, 1.0, 1.0, 1.0, 1, 1, 9)),
            "allows no period at rate 1",
        ),
        (lambda: suggest_mu(EXAMPLE, 100_000), "does not allow period 100000"),
        (lambda: EXAMPLE.bound(0.5, 2, 1.0), r"delta.*\(0, 1\).*1"),
    ],
)
def test_bad_values_are_named(make, shown):
    with pytest.raises(ValueError, match=shown):
        make()
