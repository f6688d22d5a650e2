"""Evaluates M-AVG's bound and conditions (Cong and Liu, arXiv:2110.00625, Theorem 1, Lemmas 5 to 7)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from .learning_rates import check_fraction
from .sync_sets import positive_int

_PERIODS = 100_000  # largest period that is looked at
_MU_STEP = 1e-3


@dataclass(frozen=True)
class MAvgProblem:
    """The constants of Assumption 1 and the sizes of a run, and the bound for them.

    Args:
        smoothness: L, of the gradient.
        variance: sigma^2, of a stochastic gradient of one sample.
        gradient_bound: M, of the squared norm of the gradient.
        gap: F(w_1) - F*.
        rate: eta, of the local steps.
        batch_size: B, samples of a mini-batch of one worker.
        world_size: P.
        total_steps: S = N K, local steps of each worker.

    Raises:
        ValueError: a constant that is not positive and finite (the variance may be 0), with its name.
    """

    smoothness: float
    variance: float
    gradient_bound: float
    gap: float
    rate: float
    batch_size: int
    world_size: int
    total_steps: int

    def __post_init__(self) -> None:
        for name in ("smoothness", "gradient_bound", "gap", "rate"):
            value = getattr(self, name)
            if not 0.0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value!r}")
        if not 0.0 <= self.variance < math.inf:
            raise ValueError(f"variance must be at least 0 and finite, got {self.variance!r}")
        for name in ("batch_size", "world_size", "total_steps"):
            positive_int(name, getattr(self, name))

    def largest_delta(self, mu: float) -> float:
        """Returns the largest delta, ``1 - (L eta / (1 - mu))^2``, which gives the least bound."""
        return 1.0 - (self.smoothness * self.rate / (1.0 - mu)) ** 2

    def allows(self, mu: float, period: int) -> bool:
        """Whether both conditions of Theorem 1 hold for some delta in (0, 1).

        ``1 >= L^2 eta^2 (K + 1)(K - 2) / (2 (1 - mu)^2) + 2 eta L K / (1 - mu)``. Section III.C prints a
        minus between the two, which the proof does not bear out.
        """
        x = self.smoothness * self.rate / (1.0 - mu)
        return 1.0 >= x**2 * (period + 1) * (period - 2) / 2 + 2 * x * period and self.largest_delta(mu) > 0.0

    def bound(self, mu: float, period: int, delta: float | None = None) -> float:
        """Returns g of equation 3, which bounds the mean squared gradient norm over ``N = S / K`` blocks.

        Args:
            mu: block momentum.
            period: K.
            delta: of the theorem, in (0, 1). None: the largest that is allowed.

        Raises:
            ValueError: ``mu`` or ``delta`` out of range.
        """
        delta = self._delta(mu, delta)
        length, rest = period - 1 + delta, 1.0 - mu
        smooth, eta, noise = self.smoothness, self.rate, self.variance / self.batch_size
        blocks = self.total_steps / period
        start = 2 * rest * self.gap / (blocks * length * eta)
        drift = (
            (smooth * eta) ** 2 * noise * (2 * period - 1) * period * (period - 1) / (6 * length * rest**2)
        )
        sampling = (2 * smooth * period**2 * noise * eta / (self.world_size * length * rest)) * (
            1 + mu**2 / (2 * rest**2)
        )
        momentum = smooth * eta * mu**2 * period**2 * self.gradient_bound / (length * rest**3)
        return start + drift + sampling + momentum

    def condition_11(self, mu: float, delta: float | None = None) -> tuple[float, float]:
        """Returns both sides of condition (11), the same as (12): left > right means ``g(K = 2) < g(K = 1)``.

        Then the best period is above 1 (Lemma 5), and by the paper not above that of ``mu = 0`` (Lemma 7).
        """
        delta = self._delta(mu, delta)
        smooth, eta, rest = self.smoothness, self.rate, 1.0 - mu
        noise = self.variance / self.batch_size
        left = (1 - delta) / delta * self.gap / (self.total_steps * eta)
        sampling = smooth * noise * eta / self.world_size
        inner = mu**2 / rest**2 * (sampling + smooth * eta * self.gradient_bound) + 2 * sampling
        right = (smooth * eta) ** 2 * noise / (2 * rest**3) + (3 * delta - 1) / (2 * delta) * inner / rest**2
        return left, right

    def on(self, world_size: int) -> MAvgProblem:
        """Returns the same number of samples ``N P B K`` on another number of workers, as in Lemma 6."""
        steps = max(1, round(self.total_steps * self.world_size / positive_int("world_size", world_size)))
        return replace(self, world_size=world_size, total_steps=steps)

    def _delta(self, mu: float, delta: float | None) -> float:
        check_fraction("mu", mu)
        if delta is None:
            delta = min(self.largest_delta(mu), 1.0 - 1e-12)
        if not 0.0 < delta < 1.0:
            raise ValueError(
                f"delta must be in (0, 1), got {delta:g}: the theorem does not hold at this rate and mu"
            )
        return delta


@dataclass(frozen=True)
class BlockAdvice:
    """A suggested period and block momentum, with the values of the bound.

    Attributes:
        mu: block momentum.
        period: K.
        bound: g at this ``mu`` and period.
        plain: g of K-AVG with ``K = 1``, the bound of mini-batch SGD.
        condition_11: both sides of condition (11) at ``mu``.
    """

    mu: float
    period: int
    bound: float
    plain: float
    condition_11: tuple[float, float]

    def __str__(self) -> str:
        left, right = self.condition_11
        sign = ">" if left > right else "<="
        return (
            f"mu {self.mu:g}, period {self.period}: bound {self.bound:.3g} (K = 1, mu = 0: "
            f"{self.plain:.3g}); condition (11): {left:.3g} {sign} {right:.3g}"
        )


def suggest_block_period(problem: MAvgProblem, mu: float = 0.0, delta: float | None = None) -> BlockAdvice:
    """Returns the period with the least bound for this ``mu``, among those that Theorem 1 allows.

    It is a statement about the bound, for constants that are seldom known. ``docs/averaging.md`` has
    experiments.

    Raises:
        ValueError: the theorem allows no period at this rate and ``mu``.
    """
    check_fraction("mu", mu)
    best, least = 0, math.inf
    for period in range(1, min(problem.total_steps, _PERIODS) + 1):
        if not problem.allows(mu, period):
            if period > 2:  # the condition only tightens from here on
                break
            continue
        value = problem.bound(mu, period, delta)
        if value < least:
            best, least = period, value
    if best == 0:
        raise ValueError(
            f"Theorem 1 allows no period at rate {problem.rate:g}, smoothness {problem.smoothness:g}, mu "
            f"{mu:g}"
        )
    return BlockAdvice(mu, best, least, _plain(problem, delta), problem.condition_11(mu, delta))


def suggest_mu(problem: MAvgProblem, period: int, delta: float | None = None) -> BlockAdvice:
    """Returns the block momentum, to 0.001, with the least bound for this period that Theorem 1 allows.

    By Lemma 6 it grows with the number of workers at an equal number of samples: compare
    ``suggest_mu(problem.on(2 * P), period)``.

    Raises:
        ValueError: the theorem does not allow this period at this rate, at any ``mu``.
    """
    positive_int("period", period)
    best, least = -1.0, math.inf
    for i in range(int(1 / _MU_STEP)):
        mu = i * _MU_STEP
        if not problem.allows(mu, period):
            break
        value = problem.bound(mu, period, delta)
        if value < least:
            best, least = mu, value
    if best < 0.0:
        raise ValueError(f"Theorem 1 does not allow period {period} at rate {problem.rate:g}")
    return BlockAdvice(best, period, least, _plain(problem, delta), problem.condition_11(best, delta))


def _plain(problem: MAvgProblem, delta: float | None) -> float:
    return problem.bound(0.0, 1, delta)
