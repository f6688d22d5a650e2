"""``Memory``: what a rank withholds from the average, per parameter, until it is sent.

A memory obeys the conservation law. The fused pass adds the gradient to the residual and takes pairs out;
:meth:`Memory.restore` puts back what does not reach the model; :meth:`Memory.undo` takes the gradient of a
thrown-away step out again. Nothing else changes a residual.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from ..gradient.bucket import Bucket
from ..gradient.sparse_grad import SparseGrad
from ..native import ops
from ..native.fused import Fused
from .parameter_memory import BucketMemory, ParameterMemory


class Memory(ABC):
    """How gradients are corrected before selection. One instance serves one Reducer.

    Attributes:
        table: the residuals and velocities of all parameters.
    """

    table: ParameterMemory

    def __getstate__(self) -> dict[str, Any]:
        # Parameters are never pickled. A state's state_dict carries their residuals.
        return {**self.__dict__, "table": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.table = self.new_table()

    @abstractmethod
    def new_table(self) -> ParameterMemory:
        """An empty table of what this memory keeps of every parameter."""

    def for_bucket(self, bucket: Bucket) -> tuple[BucketMemory, bool]:
        """The bucket's memory, flat, and whether its layout is new. Parameters take their memory along."""
        return self.table.for_bucket(bucket)

    def settings(self) -> dict[str, object]:
        """What all ranks must share, by argument."""
        return {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in self.settings().items())})"

    @abstractmethod
    def operands(self, held: BucketMemory, grad: Tensor, *, scale: Tensor | None) -> Fused:
        """What the fused pass works on, which corrects ``grad`` into ``held.residual`` and takes pairs out.

        Args:
            held: the bucket's memory; the pass overwrites it.
            grad: shape ``(n,)``; only read.
            scale: one float32 element, a factor of the gradient; None: 1.
        """

    def accumulate(self, operands: Fused) -> int:
        """Runs the pass and takes nothing out; returns how many elements of the gradient were not finite."""
        nothing = torch.empty(0, dtype=torch.int32, device=operands.grad.device)
        return int(ops.select_indices(operands, nothing).report[1])

    def restore(self, held: BucketMemory, pairs: SparseGrad) -> None:
        """Puts pairs back that did not reach the model."""
        ops.scatter_add(held.residual, pairs.values, pairs.indices)

    def mask_velocity(self, held: BucketMemory, contributed: SparseGrad) -> None:
        """Zeroes the velocity where a value contributed, if factor masking is on."""

    @abstractmethod
    def undo(self, held: BucketMemory, operands: Fused) -> None:
        """Takes the gradient out of the memory again, to rounding, after its pairs were restored."""
