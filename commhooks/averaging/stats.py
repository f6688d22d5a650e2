"""Figures of an averager: bytes, seconds, and how far apart the ranks were."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from ..transports import Transport


@dataclass
class Figures:
    """Figures of one rank.

    Attributes:
        bytes_sent: in synchronisations so far, headers included.
        bytes_received: likewise.
        seconds: wall-clock time in synchronisations so far.
        last_seconds: wall-clock time of the last synchronisation.
        distance: L2 norm of this rank's own tensors minus the average, before the last synchronisation. The
            root of the mean of its square over the ranks is the consensus distance.
    """

    bytes_sent: int = 0
    bytes_received: int = 0
    seconds: float = 0.0
    last_seconds: float = 0.0
    distance: float | None = None

    @contextmanager
    def of(self, transports: Callable[[], Sequence[Transport]]) -> Iterator[None]:
        """Counts the time of the block and the traffic in it, also of transports that open in it."""
        sent, received = _traffic(transports())
        begun = time.perf_counter()
        yield
        self.last_seconds = time.perf_counter() - begun
        self.seconds += self.last_seconds
        now_sent, now_received = _traffic(transports())
        self.bytes_sent += now_sent - sent
        self.bytes_received += now_received - received

    def as_dict(self) -> dict[str, Any]:
        """Returns all figures by name."""
        return asdict(self)


def _traffic(transports: Sequence[Transport]) -> tuple[int, int]:
    counters = [t.counters for t in transports]
    return sum(c.bytes_sent for c in counters), sum(c.bytes_received for c in counters)
