"""Which buckets are sent densely although the scheme is sparse."""

from __future__ import annotations

from collections.abc import Callable

from ..exchange import Aggregator
from ..exchange.dense import dense_wire_bytes

Crossover = bool | Callable[[int, int, int], bool]
"""True: where the dense exchange takes fewer bytes; False: never; or a rule ``(numel, k, world_size) ->
bool``.
"""


def everything(numel: int, k: int, world_size: int) -> bool:
    """The rule by which every bucket goes densely."""
    return True


def goes_dense(crossover: Crossover, aggregator: Aggregator, numel: int, k: int, world_size: int) -> bool:
    """Whether a bucket of ``numel`` elements goes by all-reduce instead of ``k`` pairs by ``aggregator``."""
    if callable(crossover):
        return crossover(numel, k, world_size)
    return crossover and aggregator.wire_bytes(k, world_size) > dense_wire_bytes(numel, world_size)
