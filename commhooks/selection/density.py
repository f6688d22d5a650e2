"""Density schedules: the share of a gradient's elements that is sent at each step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from ..errors import says_what_to_write


def check_density(name: str, density: float) -> float:
    """Returns ``density`` as float, or raises ``ValueError`` when it is not in (0, 1]."""
    if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0.0 < density <= 1.0:
        raise ValueError(f"{name} must be in (0, 1], got {density!r}")
    return float(density)


class DensitySchedule(ABC):
    """Density as a function of the step.

    Density is k/n, the share of a gradient's elements that is sent. A step is a gradient exchange; the first
    is step 0.
    """

    @abstractmethod
    def density(self, step: int) -> float:
        """Density in (0, 1] at ``step``."""

    @abstractmethod
    def __repr__(self) -> str: ...


class ConstantDensity(DensitySchedule):
    """The same density at every step."""

    @says_what_to_write
    def __init__(self, density: float) -> None:
        self.value = check_density("density", density)

    def density(self, step: int) -> float:
        return self.value

    def __repr__(self) -> str:
        return f"{self.value!r}"


class ExponentialWarmup(DensitySchedule):
    """Density that falls exponentially from ``start`` to ``density`` and then stays constant.

    During the warm-up the density is ``start * (density / start) ** (t / warmup)``. With ``warmup_steps``,
    ``t`` is the step. With ``warmup_epochs``, ``t`` is the epoch, so that the density falls once per epoch as
    in Deep Gradient Compression. The gTop-k paper trains with a warm-up without defining it; this formula is
    our reading.

    Args:
        density: final density in (0, 1].
        warmup_steps: steps until ``density`` is reached. Exactly one of ``warmup_steps`` and
            ``warmup_epochs``.
        warmup_epochs: epochs until ``density`` is reached; needs ``steps_per_epoch``.
        steps_per_epoch: gradient exchanges per epoch.
        start: density of the first step, in (0, 1].

    Raises:
        ValueError: a density out of range, a count that is not a positive integer, both or neither of
            ``warmup_steps`` and ``warmup_epochs``, or ``warmup_epochs`` without ``steps_per_epoch``.
    """

    @says_what_to_write
    def __init__(
        self,
        density: float,
        warmup_steps: int | None = None,
        *,
        warmup_epochs: int | None = None,
        steps_per_epoch: int | None = None,
        start: float = 0.25,
    ) -> None:
        self.final = check_density("density", density)
        self.start = check_density("start", start)
        if (warmup_steps is None) == (warmup_epochs is None):
            raise ValueError(
                f"give exactly one of warmup_steps and warmup_epochs, got {warmup_steps!r} and "
                f"{warmup_epochs!r}"
            )
        if warmup_epochs is not None and steps_per_epoch is None:
            raise ValueError("warmup_epochs needs steps_per_epoch")
        if warmup_steps is not None:
            self.warmup, self.unit = _positive("warmup_steps", warmup_steps), 1
        else:
            self.warmup = _positive("warmup_epochs", warmup_epochs)
            self.unit = _positive("steps_per_epoch", steps_per_epoch)

    def density(self, step: int) -> float:
        progress = min(1.0, (step // self.unit) / self.warmup)
        if progress >= 1.0:
            return self.final
        return math.exp((1 - progress) * math.log(self.start) + progress * math.log(self.final))

    def __repr__(self) -> str:
        return f"{self.start!r}->{self.final!r} over {self.warmup}x{self.unit}"


def _positive(name: str, value: int | None) -> int:
    if not isinstance(value, int) or value <= 0:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return value


def as_schedule(density: float | DensitySchedule) -> DensitySchedule:
    """Returns a schedule as it is; makes a number a constant one."""
    return density if isinstance(density, DensitySchedule) else ConstantDensity(density)
