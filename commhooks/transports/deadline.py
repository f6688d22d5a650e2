"""How long a polled wait has lasted, without the time in which the process was stopped."""

from __future__ import annotations

import time

_LONGEST_PAUSE_S = 1.0
"""Polls follow one another within milliseconds: a longer pause is one in which the process did not run."""


class Deadline:
    """The end of a wait that polls. Time in which this process was stopped does not count.

    A scheduler suspends all ranks of a job (SIGSTOP) and wakes them hours later. By the clock every wait
    would then be over its limit.

    Args:
        timeout_s: seconds until the wait is given up. A pause between two polls counts as at most one second
            of them, or as a quarter of ``timeout_s`` if that is less.
    """

    def __init__(self, timeout_s: float) -> None:
        self._left_s, self._longest_s = timeout_s, min(_LONGEST_PAUSE_S, timeout_s / 4)
        self._last = time.monotonic()

    def has_passed(self) -> bool:
        """Whether the time is over; to be asked at every poll."""
        now = time.monotonic()
        self._left_s -= min(now - self._last, self._longest_s)
        self._last = now
        return self._left_s < 0.0
