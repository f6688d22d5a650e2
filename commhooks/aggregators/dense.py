"""Dense: everything is sent, by an ordinary all-reduce. The baseline, and the way of buckets too small to
thin out."""

from __future__ import annotations

from torch import Tensor

from ..sparse import SparseGrad
from ..transports import Transport
from .base import Aggregated, Aggregator, Context
from .summed import summed


class Dense(Aggregator):
    """Sums whole corrected gradients; takes no selector. ``4 * (n + 1)`` bytes are all-reduced per bucket."""

    def aggregate(self, pairs: SparseGrad, nonfinite: bool, context: Context) -> Aggregated:
        raise TypeError("Dense takes no selection: the reducer calls dense_sum instead")

    def wire_bytes(self, k: int, world_size: int) -> int:
        return dense_wire_bytes(k, world_size)


def dense_wire_bytes(numel: int, world_size: int) -> int:
    """Bytes a rank sends for ``numel`` float32 elements and the vote, by a ring all-reduce."""
    return 2 * (world_size - 1) * 4 * (numel + 1) // world_size


def dense_sum(
    transport: Transport, corrected: Tensor, nonfinite: bool, context: Context
) -> tuple[Tensor, bool]:
    """The sum over ranks of ``corrected`` (n,) float32, and whether any rank voted non-finite."""
    return summed(transport, corrected, nonfinite, context)
