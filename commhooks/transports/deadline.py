"""``Deadline``: the time limit of a wait by polling, without the time in which the process was suspended."""

from __future__ import annotations

import time

_LONGEST_PAUSE_S = 1.0
"""Polls follow one another within milliseconds. In a longer pause the process did not run."""


class Deadline:
    """The time limit of a wait by polling. Time in which this process was suspended does not count.

    A scheduler may suspend all ranks of a job (SIGSTOP) and resume them hours later. By the clock every wait
    would then exceed its limit.

    Args:
        timeout_s: seconds until the limit. The time between two polls counts as at most one second, or as a
            quarter of ``timeout_s`` if that is less.
    """

    def __init__(self, timeout_s: float) -> None:
        self._left_s, self._longest_s = timeout_s, min(_LONGEST_PAUSE_S, timeout_s / 4)
        self._last = time.monotonic()

    def has_passed(self) -> bool:
        """Whether the limit is exceeded. Call this at every poll."""
        now = time.monotonic()
        self._left_s -= min(now - self._last, self._longest_s)
        self._last = now
        return self._left_s < 0.0
