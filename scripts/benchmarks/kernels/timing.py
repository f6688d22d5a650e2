"""The clock of the CPU's measurements: a kernel and its baselines in turn, medians of all turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

from ..harness.records import Record
from .records import Records

Call = Callable[[], object]
#: Beyond this the torch pipeline takes seconds, and is repeated three times only.
_SLOW_TORCH = 10_000_000


class Bench(Records):
    """Times a kernel beside its baselines and keeps the record.

    Args:
        repeats: turns.
        threads: of the kernels.
        cpu_time: the thread's CPU time instead of the wall clock.
        file: for the records, or None.
    """

    def __init__(self, repeats: int, threads: int, cpu_time: bool = False, file: Path | None = None) -> None:
        super().__init__("cpu", threads, file)
        self.repeats = repeats
        self._clock = time.thread_time if cpu_time else time.perf_counter
        self._metric = "cpu_time" if cpu_time else "time"

    def compare(
        self, labels: Record, kernel: Call, baselines: dict[str, Call], *, between: Call = lambda: None
    ) -> None:
        """Times `kernel` and the baselines in turn; `between` runs untimed before each turn."""
        calls = {"": kernel, **baselines}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for call in calls.values():
            between()
            call()
        for turn in range(self.repeats):
            between()
            for name, call in calls.items():
                if name == "torch" and labels["numel"] > _SLOW_TORCH and turn >= 3:
                    continue
                start = self._clock()
                call()
                times[name].append(self._clock() - start)
        medians = {name: statistics.median(taken) * 1e3 for name, taken in times.items()}
        self.time(labels, medians.pop(""), medians, metric=self._metric)
