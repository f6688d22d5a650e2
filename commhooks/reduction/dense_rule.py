"""``DenseRule``: which buckets are sent densely although the scheme is sparse."""

from __future__ import annotations

from collections.abc import Callable

from ..exchange import Aggregator
from ..exchange.dense import dense_wire_bytes

Crossover = bool | Callable[[int, int, int], bool]
"""When a bucket goes dense: True: where that takes fewer bytes. False: never. Or a rule.

A rule is a function ``(numel, k, world_size) -> bool``.
"""


class DenseRule:
    """Decides whether a bucket is sent densely. The answer is kept as long as k and world size do not change.

    Args:
        crossover: True, False, or a rule that depends on its arguments alone.
        aggregator: the sparse exchange, with whose bytes the dense exchange is compared.
    """

    def __init__(self, crossover: Crossover, aggregator: Aggregator) -> None:
        self._crossover, self._aggregator = crossover, aggregator
        self._last: dict[int, tuple[int, int, bool]] = {}  # by elements: k, world size, the answer

    def goes_dense(self, numel: int, k: int, world_size: int) -> bool:
        """Whether to all-reduce ``numel`` elements instead of sending ``k`` pairs by the aggregator."""
        last = self._last.get(numel)
        if last is None or last[0] != k or last[1] != world_size:
            last = self._last[numel] = (k, world_size, self._decide(numel, k, world_size))
        return last[2]

    def _decide(self, numel: int, k: int, world_size: int) -> bool:
        if callable(self._crossover):
            return self._crossover(numel, k, world_size)
        smaller = dense_wire_bytes(numel, world_size) < self._aggregator.wire_bytes(k, world_size)
        return self._crossover and smaller
