"""Writing an aggregated sum into the gradient buffer, and what rounding keeps from it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..gradient.sparse_grad import SparseGrad
from ..native import ops
from ..native.fused import PAD


def write_sparse(
    buffer: Tensor, values: Tensor, indices: Tensor, factor: float, share: float
) -> SparseGrad | None:
    """``buffer`` (n,) becomes ``factor`` times the sum of the rows, zero elsewhere.

    Args:
        buffer: float32, bfloat16 or float16; overwritten. What overflows float16 is clamped.
        values: shape ``(m, k)``, float32, added row by row.
        indices: shape ``(m, k)``, int32.
        factor: of the sum: loss scale, over the world size when it is averaged.
        share: ``factor`` times world size. What is lost is divided by it, since every rank restores the same.

    Returns:
        What half precision kept from the model, in the memory's units, to be restored on every rank; None for
        float32.
    """
    if buffer.dtype == torch.float32:
        ops.write_back(buffer, values, indices, factor)
        return None
    row, where = coalesced(values, indices)
    ops.write_back(buffer, row[None], where[None], factor)
    lost = (row * factor - buffer[where.long()].to(torch.float32)) / share
    return SparseGrad(lost, where, buffer.numel())


def write_dense(buffer: Tensor, total: Tensor, factor: float, share: float) -> Tensor | None:
    """``buffer`` (n,) becomes ``factor * total``; returns what rounding kept, None for float32.

    ``total`` (n,) float32 is overwritten.
    """
    total.mul_(factor)
    if buffer.dtype == torch.float32:
        buffer.copy_(total)
        return None
    limit = torch.finfo(buffer.dtype).max
    buffer.copy_(total.clamp(-limit, limit))
    return total.sub_(buffer.to(torch.float32)).div_(share)


def coalesced(values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``(m, k)`` as one row with unique ascending indices, without padding; rows are added in order."""
    used = indices != PAD
    if values.shape[0] == 1:
        return values[used], indices[used]
    where, place = torch.unique(indices[used], sorted=True, return_inverse=True)
    total = torch.zeros(where.numel(), dtype=torch.float32, device=values.device)
    ends = [0, *used.sum(1).cumsum(0).tolist()]
    row_values = values[used]
    for start, end in zip(ends, ends[1:], strict=False):  # one row at a time: the order defines the bits
        total.index_add_(0, place[start:end], row_values[start:end])
    return total, where
