"""All-gather: the sum contains every rank's whole selection, on the union of all indices."""

from __future__ import annotations

from ..gradient.sparse_grad import SparseGrad
from ..transports import Transport
from ..wire.message import HEADER_BYTES, Context, pack, unpack_all
from .base import Aggregated, Aggregator


class AllGather(Aggregator):
    """Sums all ranks' selections: Algorithm 1 of M-DSGD (arXiv:1905.12960) with any mask.

    No pair is refused. The traffic grows with the number of ranks: a rank receives
    ``(P - 1) * (8k + header)`` bytes. Values are added in rank order, so all ranks get the same bits.
    """

    def aggregate(
        self, transport: Transport, pairs: SparseGrad, nonfinite: bool, context: Context
    ) -> Aggregated:
        send = pack(pairs, nonfinite, context)
        received = send.new_empty((transport.world_size, send.numel()))
        transport.all_gather(send, received, tag=context.tag, what=str(context))
        values, indices, vote = unpack_all(received, pairs.numel, context)
        return Aggregated(values, indices, contributed=pairs, refused=None, nonfinite=vote)

    def wire_bytes(self, k: int, world_size: int) -> int:
        return (world_size - 1) * (8 * k + HEADER_BYTES)
