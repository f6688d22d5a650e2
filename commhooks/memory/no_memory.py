"""``NoMemory``: nothing is withheld, what is not sent is lost. For comparisons."""

from __future__ import annotations

import torch
from torch import Tensor

from ..gradient.bucket import Bucket
from ..native import ops
from ..native.fused import Fused, Selected
from ..selection.selectors import Selector
from .base import Memory
from .parameter_memory import BucketMemory, ParameterMemory


class NoMemory(Memory):
    """No error feedback: what is not sent is lost, against the conservation law. For comparisons."""

    def __init__(self) -> None:
        self.table = self.new_table()

    def new_table(self) -> ParameterMemory:
        return ParameterMemory(with_velocity=False, with_residual=False)

    def describe(self) -> str:
        return "NoMemory()"

    __repr__ = describe

    def slot(self, bucket: Bucket) -> tuple[BucketMemory, bool]:
        slot, is_new = self.table.slot(bucket)
        slot.residual.zero_()
        return slot, is_new

    def select(
        self,
        slot: BucketMemory,
        grad: Tensor,
        selector: Selector,
        k: int,
        *,
        scale: Tensor | None,
        step: int,
        stream: int,
    ) -> Selected:
        return selector.select(Fused(grad, slot.residual, scale_tensor=scale), k, step=step, stream=stream)

    def accumulate(self, slot: BucketMemory, grad: Tensor, *, scale: Tensor | None) -> int:
        nothing = torch.empty(0, dtype=torch.int32, device=grad.device)
        return int(ops.select_indices(Fused(grad, slot.residual, scale_tensor=scale), nothing).report[1])

    def undo(self, slot: BucketMemory, grad: Tensor, *, scale: Tensor | None) -> None:
        slot.residual.zero_()
