"""The figures of a step: traffic, seconds of each phase, and delta of the gTop-k paper."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from ..exchange import Aggregated
from ..native import ops
from ..transports import Counters, Transport

PHASES = ("select", "exchange", "write_back")


class DeltaMeter:
    """Measures delta of Assumption 1 of the gTop-k paper: does the selection beat a random one?

    ``delta = ||mean_p c_p - s / P||^2 / ((1 - k/n) ||mean_p c_p||^2)``, where ``c_p`` is rank p's corrected
    gradient and ``s`` the exchanged sum. The denominator follows from eq. 15. The difference in the numerator
    is the mean residual after the exchange, so one dense all-reduce of residuals per bucket suffices. The
    theory assumes delta <= 1. Squared norms are added over the step's buckets.
    """

    def __init__(self) -> None:
        self._numerator = self._denominator = 0.0

    def add(self, transport: Transport, residual: Tensor, out: Aggregated, k: int, tag: int) -> None:
        """Adds one bucket. A collective call.

        ``residual`` (n,) is only read. It does not contain the pairs that the exchange refused.
        """
        withheld = residual.clone()
        if out.refused is not None:
            ops.scatter_add(withheld, out.refused.values, out.refused.indices)
        with transport.uncounted():
            transport.all_reduce(withheld, tag=tag, what="measuring delta")
        corrected = withheld.clone()
        for values, indices in zip(out.values, out.indices, strict=True):
            ops.scatter_add(corrected, values, indices)
        n = max(1, withheld.numel())
        self._numerator += float(torch.linalg.vector_norm(withheld, dtype=torch.float64)) ** 2
        self._denominator += (1 - k / n) * float(
            torch.linalg.vector_norm(corrected, dtype=torch.float64)
        ) ** 2

    def value(self) -> float:
        """Returns the step's delta; 0 when everything was sent."""
        return self._numerator / self._denominator if self._denominator > 0.0 else 0.0


@dataclass
class StepFigures:
    """Figures of one step on this rank.

    Attributes:
        bytes_sent: bytes this rank sent, headers included. Settings checks and measurements are not counted.
        bytes_received: bytes this rank received, counted likewise.
        dense_bytes: bytes of the gradients themselves, in their own dtype.
        seconds: wall-clock seconds by phase (:data:`PHASES`), measured on the host.
        nonfinite_buckets: indices of the buckets that were thrown away.
        misses: selections whose sampled guess was wrong. Their result is exact, but slower.
        delta: measures delta.
    """

    bytes_sent: int = 0
    bytes_received: int = 0
    dense_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    nonfinite_buckets: list[int] = field(default_factory=list)
    misses: int = 0
    delta: DeltaMeter = field(default_factory=DeltaMeter)

    def add(self, *, sent: int = 0, received: int = 0, dense_bytes: int = 0, misses: int = 0) -> None:
        """Adds bytes that were sent and received, bytes of gradients, and wrong guesses of selections."""
        self.bytes_sent += sent
        self.bytes_received += received
        self.dense_bytes += dense_bytes
        self.misses += misses

    def phase(self, name: str, counters: Counters | None = None) -> Phase:
        """Returns a ``with`` block whose time is added to ``seconds[name]``.

        Where ``counters`` are given, the block's traffic is added too.
        """
        return Phase(self, name, counters)

    def report(self) -> dict[str, Any]:
        """Returns the figures by name, with the ratio of dense bytes to bytes sent."""
        ratio = self.dense_bytes / self.bytes_sent if self.bytes_sent else float("inf")
        return {
            "bytes_sent": self.bytes_sent,
            "bytes_received": self.bytes_received,
            "dense_bytes": self.dense_bytes,
            "compression_ratio": ratio,
            "misses": self.misses,
            "seconds": dict(self.seconds),
        }


class Phase:
    """One phase of one exchange, named ``commhooks.<name>`` in a profiler's trace."""

    __slots__ = ("_counters", "_figures", "_name", "_received", "_record", "_sent", "_start")
    _record: Any  # torch's record_function is not typed

    def __init__(self, figures: StepFigures, name: str, counters: Counters | None) -> None:
        self._figures, self._name, self._counters = figures, name, counters

    def __enter__(self) -> None:
        if self._counters is not None:
            self._sent, self._received = self._counters.bytes_sent, self._counters.bytes_received
        self._record = record_function(f"commhooks.{self._name}")
        self._start = time.perf_counter()
        self._record.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._record.__exit__(kind, error, trace)
        figures = self._figures
        figures.seconds[self._name] += time.perf_counter() - self._start
        if self._counters is not None:
            figures.add(
                sent=self._counters.bytes_sent - self._sent,
                received=self._counters.bytes_received - self._received,
            )
