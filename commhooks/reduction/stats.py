"""What a Reducer counts: traffic, phases of a step, and Assumption 1's delta."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.profiler import record_function

from ..exchange import Aggregated
from ..native import ops
from ..transports import Counters, Transport

PHASES = ("select", "exchange", "write_back")


@dataclass
class StepFigures:
    """Figures of one step on this rank.

    Attributes:
        bytes_sent: bytes this rank sent, headers included, settings checks and measurements not.
        bytes_received: likewise.
        dense_bytes: bytes of the gradients themselves, in their own dtype.
        seconds: wall-clock by phase.
        nonfinite_buckets: indices of the buckets that were thrown away.
        misses: selections whose sampled guess did not hold (they are exact all the same, but slower).
    """

    bytes_sent: int = 0
    bytes_received: int = 0
    dense_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    nonfinite_buckets: list[int] = field(default_factory=list)
    misses: int = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time of the block to ``seconds[name]`` and names it in a profiler's trace."""
        start = time.perf_counter()
        with record_function(f"commhooks.{name}"):
            yield
        self.seconds[name] += time.perf_counter() - start

    @contextmanager
    def traffic(self, counters: Counters) -> Iterator[None]:
        """Adds what ``counters`` gain during the block."""
        sent, received = counters.bytes_sent, counters.bytes_received
        yield
        self.bytes_sent += counters.bytes_sent - sent
        self.bytes_received += counters.bytes_received - received


class DeltaMeter:
    """Assumption 1 of the gTop-k paper, measured: does the selection beat a random one?

    ``delta = ||mean_p c_p - s / P||^2 / ((1 - k/n) ||mean_p c_p||^2)``, the denominator by eq. 15. The first
    difference is the mean residual after the exchange, so one dense all-reduce of residuals per bucket tells.
    The theory holds while delta <= 1; it may fail, which is worth seeing. Norms are added over the step's
    buckets.
    """

    def __init__(self) -> None:
        self._numerator = self._denominator = 0.0

    def add(self, transport: Transport, residual: Tensor, out: Aggregated, k: int, tag: int) -> None:
        """Adds one bucket, after what was refused is back in ``residual`` (n,), which is only read."""
        withheld = residual.clone()
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
        """Delta of the step; 0 when nothing was withheld."""
        return self._numerator / self._denominator if self._denominator > 0.0 else 0.0
