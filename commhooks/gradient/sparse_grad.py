"""``SparseGrad``: the k (value, index) pairs that are sent instead of a dense gradient."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..native import ops
from ..native.fused import PAD

HEADER_WORDS = 4
"""int32 words before the indices and the values' bits in a message; ``wire/message.py`` writes them."""


@dataclass(frozen=True)
class SparseGrad:
    """A flat gradient of ``numel`` elements of which at most ``k`` are stored, as (value, index) pairs.

    Attributes:
        values: shape ``(k,)``, float32.
        indices: shape ``(k,)``, int32, ascending and unique. Unused places are at the end and have index
            ``PAD`` (2**31 - 1) and value 0, so that a message has the same size when fewer pairs exist.
        numel: length of the dense gradient.
        message: the message whose places the pairs are (``places``), so that it needs no copy of them to be
            sent. None: they are in no message.

    Raises:
        TypeError: a wrong dtype.
        ValueError: shapes that differ or are not 1-D, or ``numel`` out of range.
    """

    values: Tensor
    indices: Tensor
    numel: int
    message: Tensor | None = field(default=None, compare=False, repr=False)

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


def empty_message(k: int, device: torch.device) -> Tensor:
    """Returns an uninitialised buffer for a message of ``k`` pairs, to write or to receive in."""
    return torch.empty(HEADER_WORDS + 2 * k, dtype=torch.int32, device=device)


def places(message: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the places of the values, float32 ``(k,)``, and of the indices, int32 ``(k,)``, in a message.

    Args:
        message: shape ``(HEADER_WORDS + 2 k,)``, int32. The places are views of it.
    """
    k = (message.numel() - HEADER_WORDS) // 2
    return message[HEADER_WORDS + k :].view(torch.float32), message[HEADER_WORDS : HEADER_WORDS + k]
