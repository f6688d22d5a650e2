"""Dense: every element is sent, by an ordinary all-reduce."""

from __future__ import annotations

from ..gradient.sparse_grad import SparseGrad
from ..transports import Transport
from ..wire.message import Context
from .base import Aggregated, Aggregator


class Dense(Aggregator):
    """Sums whole gradients by all-reduce, without a selector. The baseline for comparisons.

    ``4 * (n + 1)`` bytes are all-reduced for a bucket of n elements, vote included.
    """

    takes_selection = False

    def aggregate(
        self, transport: Transport, pairs: SparseGrad, nonfinite: bool, context: Context
    ) -> Aggregated:
        raise TypeError("Dense takes no selection: the reducer sums whole buckets instead")

    def wire_bytes(self, k: int, world_size: int) -> int:
        return dense_wire_bytes(k, world_size)


def dense_wire_bytes(numel: int, world_size: int) -> int:
    """Returns the bytes that a rank sends in a ring all-reduce of ``numel`` float32 elements and the vote."""
    return 2 * (world_size - 1) * 4 * (numel + 1) // world_size
