"""Memory: what a rank withholds from the average, per parameter, until it is sent.

Conservation is its law. ``select`` adds the gradient and takes pairs out; whatever does not reach the model
comes back by ``restore``; ``undo`` takes a gradient out again whose step is thrown away. Nothing else changes
a residual.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from ..gradient.bucket import Bucket
from ..gradient.sparse_grad import SparseGrad
from ..native import ops
from ..native.fused import Selected
from ..selection.selectors import Selector
from .parameter_memory import BucketMemory, ParameterMemory


class Memory(ABC):
    """How gradients are corrected before selection. One instance serves one Reducer."""

    table: ParameterMemory

    def __getstate__(
        self,
    ) -> dict[str, Any]:  # parameters are never pickled; a state's dict holds what they own
        return {**self.__dict__, "table": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.table = self.new_table()

    @abstractmethod
    def new_table(self) -> ParameterMemory:
        """An empty table of what this memory keeps of every parameter."""

    @abstractmethod
    def slot(self, bucket: Bucket) -> tuple[BucketMemory, bool]:
        """The bucket's flat memory, and whether its layout is new; carried over by parameter when it
        changed."""

    @abstractmethod
    def describe(self) -> str:
        """Settings that all ranks must share, in one line."""

    @abstractmethod
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
        """Corrects ``grad`` (n,) and takes ``k`` pairs out of the slot's residual, which is overwritten."""

    @abstractmethod
    def accumulate(self, slot: BucketMemory, grad: Tensor, *, scale: Tensor | None) -> int:
        """Corrects ``grad`` into the slot's residual and takes nothing out; returns the non-finite count."""

    def restore(self, slot: BucketMemory, pairs: SparseGrad) -> None:
        """Puts pairs back that did not reach the model."""
        ops.scatter_add(slot.residual, pairs.values, pairs.indices)

    def mask_velocity(self, slot: BucketMemory, contributed: SparseGrad | None) -> None:
        """Momentum factor masking at what contributed, when it is on."""

    @abstractmethod
    def undo(self, slot: BucketMemory, grad: Tensor, *, scale: Tensor | None) -> None:
        """Takes ``grad`` out of the slot again, to rounding, after every pair it gave was restored."""
