"""``SparseGrad``: the k pairs that travel instead of a dense gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..native import ops
from ..native.fused import PAD


@dataclass(frozen=True)
class SparseGrad:
    """A flat gradient of ``numel`` elements of which only ``k`` places are held.

    Attributes:
        values: shape ``(k,)``, float32.
        indices: shape ``(k,)``, int32, ascending and unique. Unused places stand at the end with index
            ``PAD`` (2**31 - 1) and value 0, so that messages keep their size when fewer elements exist.
        numel: length of the dense gradient.
    """

    values: Tensor
    indices: Tensor
    numel: int

    def __post_init__(self) -> None:
        if self.values.dtype != torch.float32 or self.indices.dtype != torch.int32:
            raise TypeError(
                f"values and indices must be float32 and int32, got {self.values.dtype} "
                f"and {self.indices.dtype}"
            )
        if self.values.shape != self.indices.shape or self.values.dim() != 1:
            raise ValueError(
                f"values and indices must be 1-D of one length, got {tuple(self.values.shape)} "
                f"and {tuple(self.indices.shape)}"
            )
        if not 0 <= self.numel < PAD:
            raise ValueError(f"numel must be in [0, 2**31 - 1), got {self.numel}")

    @property
    def k(self) -> int:
        """Number of places, padding included."""
        return self.values.numel()

    @property
    def used(self) -> Tensor:
        """Boolean ``(k,)``: which places are not padding."""
        return self.indices != PAD

    def masked(self, keep: Tensor) -> SparseGrad:
        """The pairs where the boolean ``keep`` of shape ``(k,)`` holds, without padding."""
        places = (keep & self.used).nonzero().squeeze(1)  # once for both: boolean indexing would look twice
        return SparseGrad(
            self.values.index_select(0, places), self.indices.index_select(0, places), self.numel
        )

    def to_dense(self) -> Tensor:
        """A new dense float32 tensor of shape ``(numel,)``, zero where nothing is held."""
        dense = self.values.new_zeros(self.numel)
        ops.scatter_add(dense, self.values, self.indices)
        return dense
