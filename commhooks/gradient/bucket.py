"""``Bucket``: a flat gradient and the parameters whose gradients it concatenates."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_NUMEL = 2**31 - 1


@dataclass(frozen=True)
class Bucket:
    """A flat gradient that a Reducer overwrites with its average over the ranks.

    The gradient consists of segments, one per parameter.

    Attributes:
        index: position among the step's buckets; the same bucket has the same index on all ranks.
        buffer: shape ``(n,)``, float32, bfloat16 or float16, contiguous. Overwritten with the result.
        keys: one per segment: DDP's ``Parameter`` object or a name. The memory is stored by key.
        numels: number of elements of each segment, in the buffer's order. The sum is ``n``.
        is_last: whether this bucket ends the step.

    Raises:
        TypeError: the buffer is sparse or of another dtype.
        ValueError: the buffer is not flat and contiguous or has 2**31 - 1 elements or more, or ``keys`` and
            ``numels`` do not fit it.
    """

    index: int
    buffer: Tensor
    keys: tuple[Hashable, ...]
    numels: tuple[int, ...]
    is_last: bool = True

    def __post_init__(self) -> None:
        b = self.buffer
        if b.layout != torch.strided or b.dtype not in _DTYPES:
            raise TypeError(
                f"bucket {self.index}: gradients must be dense float32, bfloat16 or float16, got {b.dtype} "
                f"({b.layout})"
            )
        if b.dim() != 1 or not b.is_contiguous():
            raise ValueError(f"bucket {self.index}: buffer must be flat and contiguous, got {tuple(b.shape)}")
        if b.numel() >= _MAX_NUMEL:
            raise ValueError(
                f"bucket {self.index} has {b.numel()} elements; int32 indices allow fewer than 2**31 - 1: "
                "lower DDP's bucket_cap_mb"
            )
        if len(self.keys) != len(self.numels) or sum(self.numels) != b.numel():
            raise ValueError(
                f"bucket {self.index}: {len(self.keys)} keys with {sum(self.numels)} elements for a buffer "
                f"of {b.numel()}"
            )

    @property
    def numel(self) -> int:
        """Number of elements in the buffer."""
        return self.buffer.numel()

    def take_out(self, positions: Sequence[int]) -> dict[int, Tensor]:
        """Sets the segments at ``positions``, which hold no gradient of this step, to zero.

        Waits for the device.

        Returns:
            Copies of the segments that were not zero, by position, for :meth:`put_back`.
        """
        held = {p: s.clone() for p in positions if bool((s := self._segment(p)).any())}
        for position in held:
            self._segment(position).zero_()
        return held

    def put_back(self, held: dict[int, Tensor]) -> None:
        """Restores the segments in ``held`` that are zero after the reduction.

        Such a segment is zero because no rank had a gradient there. With ``gradient_as_bucket_view`` the
        segment is the parameter's ``.grad``, which a step without a gradient must leave unchanged. Waits for
        the device.

        Args:
            held: what :meth:`take_out` returned.
        """
        for position, values in held.items():
            if not bool(self._segment(position).any()):
                self._segment(position).copy_(values)

    def _segment(self, position: int) -> Tensor:
        start = sum(self.numels[:position])
        return self.buffer[start : start + self.numels[position]]
