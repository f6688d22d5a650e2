"""Synchronisation sets: after which local steps the workers average (Local SGD, arXiv:1805.09767, section 2).

Steps count from 1: ``step in sync`` asks whether to synchronise after the ``step``-th local step. All sets
are frozen and depend on the step alone, so that a resumed run and every rank agree.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..errors import callers_level


def positive_int(name: str, value: object) -> int:
    """Returns ``value``, or raises ``ValueError`` when it is not an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return value


class SyncSet(ABC):
    """A set of local steps, ``I_T`` in the paper."""

    @abstractmethod
    def __contains__(self, step: object) -> bool:
        """Whether the workers average after local step ``step`` (the first step is 1)."""

    def starts_after(self, step: int) -> bool:
        """Whether the first block of local steps begins after step ``step``, without an averaging there."""
        return False

    def gap(self, total_steps: int) -> int:
        """Returns the largest distance between neighbouring synchronisations, from step 0 to ``total_steps``.

        The distance from the last synchronisation to ``total_steps`` counts as well, as the paper's T is in
        the set.
        """
        positive_int("total_steps", total_steps)
        steps = [0, *(t for t in range(1, total_steps + 1) if t in self), total_steps]
        return max(b - a for a, b in zip(steps, steps[1:], strict=False))


@dataclass(frozen=True)
class Every(SyncSet):
    """Steps ``start + period``, ``start + 2 * period``, ...

    Args:
        period: local steps between two averagings (H, K or I in the papers).
        start: nothing is averaged up to this step (gradients are reduced by other means until then).
        total_steps: when given, this last step is in the set as well, as the paper asks of T.
    """

    period: int
    start: int = 0
    total_steps: int | None = None

    def __post_init__(self) -> None:
        positive_int("period", self.period)
        if not isinstance(self.start, int) or self.start < 0:
            raise ValueError(f"start must be an integer of at least 0, got {self.start!r}")
        if self.total_steps is not None:
            positive_int("total_steps", self.total_steps)

    def __contains__(self, step: object) -> bool:
        if not isinstance(step, int) or step < 1:
            return False
        return step == self.total_steps or (step > self.start and (step - self.start) % self.period == 0)

    def starts_after(self, step: int) -> bool:
        return 0 < step == self.start


@dataclass(frozen=True)
class AtSteps(SyncSet):
    """Exactly these steps. Include the last one: what follows it is never averaged."""

    steps: frozenset[int]

    def __init__(self, steps: Iterable[int]) -> None:
        chosen = frozenset(positive_int("every element of steps", s) for s in steps)
        if not chosen:
            raise ValueError("steps must not be empty")
        object.__setattr__(self, "steps", chosen)

    def __contains__(self, step: object) -> bool:
        return step in self.steps

    def __repr__(self) -> str:
        return f"AtSteps({sorted(self.steps)})"  # a frozenset's own order differs between processes


@dataclass(frozen=True)
class OneShot(SyncSet):
    """One-shot averaging: only after the last step."""

    total_steps: int

    def __post_init__(self) -> None:
        positive_int("total_steps", self.total_steps)

    def __contains__(self, step: object) -> bool:
        return step == self.total_steps


@dataclass(frozen=True)
class Growing(SyncSet):
    """Often at first, then ever more rarely: the gaps grow geometrically up to ``maximum``.

    Gap i is ``first * factor**i``, rounded down, and at most ``maximum``. The paper's section 3 ("adaptive
    communication frequency") suggests growing gaps and leaves the rule open. This geometric one is ours.
    """

    first: int
    maximum: int
    factor: float = 2.0
    total_steps: int | None = None

    def __post_init__(self) -> None:
        positive_int("first", self.first)
        positive_int("maximum", self.maximum)
        if self.maximum < self.first:
            raise ValueError(f"maximum must be at least first = {self.first}, got {self.maximum}")
        if not 1.0 < self.factor < math.inf:
            raise ValueError(f"factor must be above 1 and finite, got {self.factor!r}")
        if self.total_steps is not None:
            positive_int("total_steps", self.total_steps)

    def __contains__(self, step: object) -> bool:
        if not isinstance(step, int) or step < 1:
            return False
        if step == self.total_steps:
            return True
        reached, gap = 0, float(self.first)
        while reached < step and gap < self.maximum:  # few turns: the gaps grow geometrically
            reached += int(gap)
            gap *= self.factor
        if reached >= step:
            return reached == step
        return (step - reached) % self.maximum == 0


@dataclass(frozen=True)
class PostLocal(SyncSet):
    """Every step up to ``start`` (as mini-batch SGD), then ``then``, counted from there (post-local SGD)."""

    start: int
    then: SyncSet

    def __post_init__(self) -> None:
        if not isinstance(self.start, int) or self.start < 0:
            raise ValueError(f"start must be an integer of at least 0, got {self.start!r}")
        if not isinstance(self.then, SyncSet):
            raise ValueError(f"then must be a SyncSet, got {self.then!r}")

    def __contains__(self, step: object) -> bool:
        if not isinstance(step, int) or step < 1:
            return False
        return step <= self.start or (step - self.start) in self.then

    def starts_after(self, step: int) -> bool:
        return self.then.starts_after(step - self.start)


Period = int | SyncSet | Iterable[int]
"""What an averager takes as ``period``: local steps between averagings, a set, or the steps themselves."""


def as_sync_set(period: Period | None, options: dict[str, Any] | None = None) -> SyncSet:
    """Returns the set that a ``period=`` argument means.

    Args:
        period: a number of steps, a set, or the steps themselves.
        options: further keywords. ``sync``, the old name of ``period``, is removed from them.

    Warns:
        DeprecationWarning: ``sync`` is given.

    Raises:
        ValueError: neither ``period`` nor ``sync`` is given, or both are, or it is something else.
    """
    if options is not None and "sync" in options:
        if period is not None:
            raise ValueError(f"period and sync are one setting, got {period!r} and {options['sync']!r}")
        warnings.warn("sync= is now called period=", DeprecationWarning, stacklevel=callers_level())
        period = options.pop("sync")
    if isinstance(period, SyncSet):
        return period
    if isinstance(period, int):
        return Every(positive_int("period", period))
    if isinstance(period, str) or not isinstance(period, Iterable):
        raise ValueError(f"period must be a number of steps, a SyncSet or the steps, got {period!r}")
    return AtSteps(period)


def suggest_period(total_steps: int, world_size: int, batch_size: int = 1, scale: float = 1.0) -> int:
    """Returns the longest period without asymptotic cost: ``H = scale * sqrt(T / (P b))``, at least 1.

    Source: arXiv:1805.09767, section 2.2.

    Args:
        total_steps: T, local steps of each worker.
        world_size: P.
        batch_size: b, samples of each worker's mini-batch.
        scale: the constant of the O(.). The paper's includes sigma / G.
    """
    for name, value in (("total_steps", total_steps), ("world_size", world_size), ("batch_size", batch_size)):
        positive_int(name, value)
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale!r}")
    return max(1, math.floor(scale * math.sqrt(total_steps / (world_size * batch_size))))


def suggest_restart_period(total_steps: int, world_size: int, *, iid: bool = True, scale: float = 1.0) -> int:
    """Returns a period for ``RestartedMomentum``, by the paper's main results, at least 1.

    ``I = scale * T**(1/2) / P**(3/2)`` on i.i.d. data, ``scale * T**(1/4) / P**(3/4)`` otherwise, rounded
    down. Source: arXiv:1905.03817.

    Args:
        total_steps: T, local steps of each worker.
        world_size: P.
        iid: whether the workers' data are identically distributed.
        scale: the constant of the O(.).
    """
    positive_int("total_steps", total_steps)
    positive_int("world_size", world_size)
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale!r}")
    rate = math.sqrt(total_steps) / world_size**1.5
    return max(1, math.floor(scale * (rate if iid else math.sqrt(rate))))
