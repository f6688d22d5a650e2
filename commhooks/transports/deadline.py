"""``Deadline``: the time limit of waits. Time in which the process was suspended does not count in polls."""

from __future__ import annotations

import math
import time

_LONGEST_PAUSE_S = 1.0
"""Polls follow one another within milliseconds. In a longer pause the process did not run."""


class Deadline:
    """The time limit of one or more waits.

    A scheduler may suspend all ranks of a job (SIGSTOP) and resume them hours later. By the clock every wait
    would then exceed its limit. So a wait that polls does not count the time in which this process was
    suspended.

    Args:
        timeout_s: seconds until the limit. The time between two polls counts as at most one second, or as a
            quarter of ``timeout_s`` if that is less.
        by_clock: count all time, for waits that do not poll and so cannot notice a suspension.
    """

    def __init__(self, timeout_s: float, by_clock: bool = False) -> None:
        self._left_s = timeout_s
        self._longest_s = math.inf if by_clock else min(_LONGEST_PAUSE_S, timeout_s / 4)
        self._last = time.monotonic()

    def has_passed(self) -> bool:
        """Whether the limit is exceeded. Call this at every poll."""
        return self.left_s() < 0.0

    def left_s(self) -> float:
        """Seconds until the limit, negative beyond it. Call this at every poll."""
        now = time.monotonic()
        self._left_s -= min(now - self._last, self._longest_s)
        self._last = now
        return self._left_s
