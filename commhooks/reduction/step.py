"""``Step``: holds the exchanges of one training step until it is known whether the step counts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import NonFiniteGradientError
from .stats import StepFigures

logger = logging.getLogger(__name__)

_TOLD = frozenset(10**i for i in range(1, 19))
"""Numbers of skipped buckets at which the log says how many there were. The first one is told in full."""

NONFINITE = ("propagate", "skip", "error")


def check_nonfinite(policy: str) -> str:
    """Returns ``policy``, or raises ``ValueError`` when it is none of :data:`NONFINITE`."""
    if policy not in NONFINITE:
        raise ValueError(f"nonfinite must be one of {NONFINITE}, got {policy!r}")
    return policy


@dataclass(eq=False, slots=True)
class Kept:
    """One exchange that waits for the end of its step, which calls one of its two functions.

    Attributes:
        rollback: puts back what the exchange sent. Called when the step is thrown away.
        commit: makes the exchange final. Called when the step counts. None: the result was never used, so the
            end of the step rolls the exchange back.
    """

    rollback: Callable[[], None]
    commit: Callable[[], None] | None

    def use(self, commit: Callable[[], None]) -> None:
        """Makes ``commit`` the end of the exchange: its result is used."""
        self.commit = commit

    def settle(self) -> None:
        """Leaves nothing to do at the end of the step, for an exchange that was taken back already."""
        self.commit = self.rollback = _nothing


def _nothing() -> None:
    """Does nothing, in the place of commit and rollback."""


class Step:
    """Collects a step's exchanges and their figures, and applies the policy on non-finite gradients.

    NaN and Inf are noticed bucket by bucket, but a GradScaler skips whole steps. So effects that cannot be
    undone wait until the end of the step: masking the velocity, and returning what rounding kept.

    Args:
        nonfinite: ``"propagate"``, ``"skip"`` or ``"error"``: see :class:`commhooks.Reducer`.

    Attributes:
        figures: figures of the step under way.
        last: figures of the last finished step.
        nonfinite_steps: number of steps in which a bucket was thrown away.
    """

    def __init__(self, nonfinite: str) -> None:
        self.nonfinite = check_nonfinite(nonfinite)
        self.figures, self.last = StepFigures(), StepFigures()
        self.nonfinite_steps = self._skipped = 0
        self._kept: list[Kept] = []

    def keep(self, commit: Callable[[], None] | None, rollback: Callable[[], None]) -> Kept:
        """Adds an exchange, of which the end of the step calls one function.

        ``commit`` may be given later (:meth:`Kept.use`).
        """
        kept = Kept(rollback, commit)
        self._kept.append(kept)
        return kept

    @property
    def is_complete(self) -> bool:
        """Whether every exchange has its ``commit``, so that none waits for its result."""
        return all(kept.commit is not None for kept in self._kept)

    @property
    def is_under_way(self) -> bool:
        """Whether a bucket of an unfinished step has been exchanged."""
        return bool(self._kept or self.figures.nonfinite_buckets)

    def throw_away(self, result: Tensor, index: int, text: str, rank: int) -> None:
        """Applies the policy to a bucket in which a rank found NaN or Inf. Its memory is restored already.

        Args:
            result: the bucket's gradient, overwritten with NaN, or with 0 under ``"skip"``.
            index: the bucket's index.
            text: which bucket, and how many elements were not finite.
            rank: this rank, for the error.

        Raises:
            NonFiniteGradientError: under ``"error"``, after the step's other exchanges are rolled back.
        """
        self.figures.nonfinite_buckets.append(index)
        if self.nonfinite == "skip":
            self._skipped += 1
            if self._skipped == 1:
                logger.warning("%s; its update is skipped on all ranks", text)
            elif self._skipped in _TOLD:
                logger.warning("%s; %d updates of buckets skipped so far", text, self._skipped)
            result.zero_()
            return
        result.fill_(float("nan"))
        if self.nonfinite == "error":
            for kept in self._kept:
                kept.rollback()
            self.forget()
            self.nonfinite_steps += 1
            raise NonFiniteGradientError(f"rank {rank}, {text}")

    def finish(self) -> None:
        """Ends the step: commits its exchanges, or rolls them back when a bucket was thrown away.

        Under ``"skip"`` the other buckets' exchanges are committed all the same.
        """
        thrown_away = bool(self.figures.nonfinite_buckets) and self.nonfinite != "skip"
        for kept in self._kept:
            if thrown_away or kept.commit is None:
                kept.rollback()
            else:
                kept.commit()
        self.nonfinite_steps += bool(self.figures.nonfinite_buckets)
        self.last = self.figures
        self.forget()

    def forget(self) -> None:
        """Forgets the exchanges of the step under way, without commit or rollback, and its figures."""
        self._kept.clear()
        self.figures = StepFigures()

    def stats(self) -> dict[str, Any]:
        """Returns figures of the last finished step, and ``nonfinite_steps``."""
        return {**self.last.report(), "nonfinite_steps": self.nonfinite_steps}
