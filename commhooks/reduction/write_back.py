"""Writes an aggregated sum into the gradient buffer, and returns the rounding error of half precision."""

from __future__ import annotations

import torch
from torch import Tensor

from ..gradient.sparse_grad import SparseGrad
from ..native import ops


def write_sparse(
    buffer: Tensor, values: Tensor, indices: Tensor, factor: float, share: float
) -> SparseGrad | None:
    """Overwrites ``buffer`` (n,) with ``factor`` times the sum of the rows, and with 0 elsewhere.

    Args:
        buffer: float32, bfloat16 or float16; overwritten. What overflows float16 is clamped.
        values: shape ``(m, k)``, float32, added row by row.
        indices: shape ``(m, k)``, int32.
        factor: the loss scale, divided by the world size when the sum is averaged.
        share: ``factor`` times the world size. The rounding error is divided by it, because every rank adds
            the same error to its residual.

    Returns:
        The rounding error of half precision (value minus what was written), in the memory's units, to be
        added to the residual on every rank. None for float32.
    """
    if buffer.dtype == torch.float32:
        ops.write_back(buffer, values, indices, factor)
        return None
    row, where = coalesced(values, indices, buffer.numel())
    ops.write_back(buffer, row[None], where[None], factor)
    lost = (row * factor - buffer[where.long()].to(torch.float32)) / share
    return SparseGrad(lost, where, buffer.numel())


def write_dense(buffer: Tensor, total: Tensor, factor: float, share: float) -> Tensor | None:
    """Overwrites ``buffer`` (n,) with ``factor * total``.

    Args:
        buffer: float32, bfloat16 or float16; overwritten. What overflows float16 is clamped.
        total: shape ``(n,)``, float32; overwritten.
        factor: as for :func:`write_sparse`.
        share: as for :func:`write_sparse`.

    Returns:
        The rounding error ``(n,)``, as :func:`write_sparse`; None for float32.
    """
    total.mul_(factor)
    if buffer.dtype == torch.float32:
        buffer.copy_(total)
        return None
    limit = torch.finfo(buffer.dtype).max
    buffer.copy_(total.clamp(-limit, limit))
    return total.sub_(buffer.to(torch.float32)).div_(share)


def coalesced(values: Tensor, indices: Tensor, numel: int) -> tuple[Tensor, Tensor]:
    """Adds rows ``(m, k)``, in order, into one row with unique ascending indices, all in ``[0, numel)``."""
    used = (indices >= 0) & (indices < numel)
    if values.shape[0] == 1:
        return values[used], indices[used]
    where, place = torch.unique(indices[used], sorted=True, return_inverse=True)
    total = torch.zeros(where.numel(), dtype=torch.float32, device=values.device)
    ends = [0, *used.sum(1).cumsum(0).tolist()]
    row_values = values[used]
    for start, end in zip(ends, ends[1:], strict=False):  # one row at a time: the order defines the bits
        total.index_add_(0, place[start:end], row_values[start:end])
    return total, where
