"""Shared indices: all ranks hold the same mask, so only values travel, by an ordinary all-reduce."""

from __future__ import annotations

import torch

from ..sparse import SparseGrad
from .base import Aggregated, Aggregator, Context
from .dense import dense_wire_bytes


class SharedIndices(Aggregator):
    """Sums values under one mask (random-k with a shared seed): ``4 * (k + 1)`` bytes all-reduced.

    The vote on non-finite gradients is one appended element.
    """

    def aggregate(self, pairs: SparseGrad, nonfinite: bool, context: Context) -> Aggregated:
        buffer = torch.empty(pairs.k + 1, dtype=torch.float32, device=pairs.values.device)
        buffer[:-1] = pairs.values
        buffer[-1] = float(nonfinite)
        self.transport.all_reduce(buffer, tag=context.tag, what=str(context))
        return Aggregated(
            buffer[None, :-1].contiguous(),
            pairs.indices[None],
            contributed=pairs,
            refused=None,
            nonfinite=float(buffer[-1]) > 0.0,
        )

    def wire_bytes(self, k: int, world_size: int) -> int:
        return dense_wire_bytes(k, world_size)
