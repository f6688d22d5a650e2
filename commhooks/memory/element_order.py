"""``ElementOrder``: the order of a parameter's elements in its bucket, if it is not that of their indices.

DDP lays a parameter out in a bucket as it lies in memory. In ``torch.channels_last`` that order differs from
the order of the indices. Checkpoints have the order of the indices, so that they load into every layout.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..gradient.bucket import Bucket
from ..gradient.memory_order import has_other_order


@dataclass(frozen=True)
class ElementOrder:
    """Turns tensors of one parameter of ``n`` elements from one order into the other.

    Attributes:
        shape, strides: the parameter's.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def by_index(self, segment: Tensor) -> Tensor:
        """Returns a copy of ``segment`` ``(n,)`` in the order of the parameter's indices."""
        return segment.as_strided(self.shape, self.strides, segment.storage_offset()).reshape(-1).clone()

    def as_laid_out(self, values: Tensor) -> Tensor:
        """Returns a copy of ``values`` ``(n,)``, which are by index, in the bucket's order."""
        segment = values.new_empty(values.numel())
        segment.as_strided(self.shape, self.strides).copy_(values.view(self.shape))
        return segment


def order_of(parameter: object) -> ElementOrder | None:
    """Returns a parameter's order in a bucket that is laid out as parameters lie in memory.

    None: that of its indices.
    """
    if not isinstance(parameter, Tensor) or not has_other_order(parameter):
        return None
    return ElementOrder(tuple(parameter.shape), parameter.stride())


def orders_in(bucket: Bucket) -> list[ElementOrder | None]:
    """Returns the order of every parameter in the bucket. None: that of its indices."""
    return [order_of(key) if bucket.in_memory_order else None for key in bucket.keys]
