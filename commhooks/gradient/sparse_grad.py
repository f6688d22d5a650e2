"""``SparseGrad``: the k (value, index) pairs that are sent instead of a dense gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..native import ops
from ..native.fused import PAD


@dataclass(frozen=True)
class SparseGrad:
    """A flat gradient of ``numel`` elements of which at most ``k`` are stored, as (value, index) pairs.

    Attributes:
        values: shape ``(k,)``, float32.
        indices: shape ``(k,)``, int32, ascending and unique. Unused places are at the end and have index
            ``PAD`` (2**31 - 1) and value 0, so that a message has the same size when fewer pairs exist.
        numel: length of the dense gradient.

    Raises:
        TypeError: a wrong dtype.
        ValueError: shapes that differ or are not 1-D, or ``numel`` out of range.
    """

    values: Tensor
    indices: Tensor
    numel: int

    def __post_init__(self) -> None:
        if self.values.dtype != torch.float32 or self.indices.dtype != torch.int32:
            raise TypeError(
                f"values and indices must be float32 and int32, got {self.values.dtype} and "
                f"{self.indices.dtype}"
            )
        if self.values.shape != self.indices.shape or self.values.dim() != 1:
            raise ValueError(
                f"values and indices must be 1-D of one length, got {tuple(self.values.shape)} and "
                f"{tuple(self.indices.shape)}"
            )
        if not 0 <= self.numel < PAD:
            raise ValueError(f"numel must be in [0, 2**31 - 1), got {self.numel}")

    @property
    def k(self) -> int:
        """Number of places, padding included."""
        return self.values.numel()

    @property
    def used(self) -> Tensor:
        """Boolean ``(k,)``: which places hold an index of the gradient, so are not padding."""
        return (self.indices >= 0) & (self.indices < self.numel)

    def masked(self, keep: Tensor) -> SparseGrad:
        """The pairs at which ``keep`` (bool, shape ``(k,)``) is True, without padding."""
        places = (keep & self.used).nonzero().squeeze(1)  # one search for both arrays
        return SparseGrad(
            self.values.index_select(0, places), self.indices.index_select(0, places), self.numel
        )

    def to_dense(self) -> Tensor:
        """A new dense float32 tensor of shape ``(numel,)``, zero where no pair is stored."""
        dense = self.values.new_zeros(self.numel)
        ops.scatter_add(dense, self.values, self.indices)
        return dense
