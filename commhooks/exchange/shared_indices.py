"""Shared indices: all ranks choose the same indices, so only values are sent, by an ordinary all-reduce."""

from __future__ import annotations

from ..gradient.sparse_grad import SparseGrad
from ..transports import Transport
from ..wire.message import Context
from .base import Aggregated, Aggregator
from .dense import dense_wire_bytes
from .voting_sum import summed


class SharedIndices(Aggregator):
    """Sums values at indices that all ranks share (random-k with a shared seed).

    ``4 * (k + 1)`` bytes are all-reduced: the values, and one element for the vote on non-finite gradients.
    No pair is refused.
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
