"""``NoMemory``: no error feedback."""

from __future__ import annotations

from torch import Tensor

from ..gradient.bucket import Bucket
from ..native.fused import Fused
from .base import Memory
from .parameter_memory import BucketMemory, ParameterMemory


class NoMemory(Memory):
    """Drops what is not sent, against the conservation law. For comparisons, and for dense exchanges."""

    def __init__(self) -> None:
        self.table = self.new_table()

    def new_table(self) -> ParameterMemory:
        return ParameterMemory(with_velocity=False, with_residual=False)

    def for_bucket(self, bucket: Bucket) -> tuple[BucketMemory, bool]:
        held, is_new = self.table.for_bucket(bucket)
        held.residual.zero_()
        return held, is_new

    def operands(self, held: BucketMemory, bucket: Bucket, *, scale: Tensor | None) -> Fused:
        return Fused(bucket.buffer, held.residual, scale_tensor=scale)

    def undo(self, held: BucketMemory, operands: Fused, active: Tensor | None) -> None:
        held.residual.zero_()
