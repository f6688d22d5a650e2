"""All-gather: every rank's whole selection takes part (the union of all selections)."""

from __future__ import annotations

import torch

from ..gradient.sparse_grad import SparseGrad
from ..transports import Transport
from ..wire.message import HEADER_BYTES, Context, pack, unpack
from .base import Aggregated, Aggregator


class AllGather(Aggregator):
    """Sums all ranks' selections: Algorithm 1 of M-DSGD (arXiv:1905.12960) with any mask.

    Nothing is refused, at the price of traffic that grows with the number of ranks: a rank receives
    ``(P - 1) * (8k + header)`` bytes. Values are added in rank order, so all ranks get the same bits.
    """

    def aggregate(
        self, transport: Transport, pairs: SparseGrad, nonfinite: bool, context: Context
    ) -> Aggregated:
        send = pack(pairs, nonfinite, context)
        received = send.new_empty((transport.world_size, send.numel()))
        transport.all_gather(send, received, tag=context.tag, what=str(context))
        rows, votes = [], []
        for rank, message in enumerate(received):
            row, vote = unpack(message, pairs.numel, rank, context)
            rows.append(row)
            votes.append(vote)
        return Aggregated(
            torch.stack([row.values for row in rows]),
            torch.stack([row.indices for row in rows]),
            contributed=pairs,
            refused=None,
            nonfinite=any(votes),
        )

    def wire_bytes(self, k: int, world_size: int) -> int:
        return (world_size - 1) * (8 * k + HEADER_BYTES)
