"""Shared indices: all ranks hold the same mask, so only values travel, by an ordinary all-reduce."""

from __future__ import annotations

from ..gradient.sparse_grad import SparseGrad
from ..transports import Transport
from ..wire.message import Context
from .base import Aggregated, Aggregator
from .dense import dense_wire_bytes
from .voting_sum import summed


class SharedIndices(Aggregator):
    """Sums values under one mask (random-k with a shared seed): ``4 * (k + 1)`` bytes all-reduced.

    The vote on non-finite gradients is one appended element.
    """

    def aggregate(
        self, transport: Transport, pairs: SparseGrad, nonfinite: bool, context: Context
    ) -> Aggregated:
        values, thrown_away = summed(transport, pairs.values, nonfinite, context)
        return Aggregated(
            values[None],
            pairs.indices[None],
            contributed=pairs,
            refused=None,
            nonfinite=thrown_away,
        )

    def wire_bytes(self, k: int, world_size: int) -> int:
        return dense_wire_bytes(k, world_size)
