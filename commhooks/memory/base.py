"""``Memory``: keeps, per parameter, the part of the gradient that a rank has not sent yet (the residual).

A memory obeys the conservation law: a gradient is either sent or in the residual. Three operations change a
residual. The fused pass adds the gradient and takes the selected pairs out. :meth:`Memory.restore` adds pairs
back that do not reach the model. :meth:`Memory.undo` subtracts the gradient of a step that is thrown away.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from ..gradient.bucket import Bucket
from ..gradient.sparse_grad import SparseGrad
from ..native import ops
from ..native.fused import Fused, Selected
from .parameter_memory import BucketMemory, ParameterMemory


class Memory(ABC):
    """How gradients are corrected before selection. One instance serves one Reducer.

    Attributes:
        table: the residuals and velocities of all parameters.
    """

    table: ParameterMemory

    def __getstate__(self) -> dict[str, Any]:
        # The table's keys are parameters, which are never pickled. state_dict() has the residuals by name.
        return {**self.__dict__, "table": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.table = self.new_table()

    @abstractmethod
    def new_table(self) -> ParameterMemory:
        """Makes an empty table with the tensors (residual, velocity) that this memory keeps per parameter."""

    def for_bucket(self, bucket: Bucket) -> tuple[BucketMemory, bool]:
        """Returns the bucket's flat memory, and whether the bucket's layout is new.

        At a new layout every parameter's residual and velocity are copied into the bucket that now holds it.
        """
        return self.table.for_bucket(bucket)

    def settings(self) -> dict[str, object]:
        """Returns the settings that must be equal on all ranks, by argument name."""
        return {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in self.settings().items())})"

    @property
    def decays(self) -> bool:
        """Whether the memory adds weight decay, for which it reads the parameters' values."""
        return False

    @property
    def clips_model(self) -> bool:
        """Whether gradients are clipped by the norm of the whole step (``Bucket.step_norm``)."""
        return False

    @abstractmethod
    def operands(self, held: BucketMemory, bucket: Bucket, *, scale: Tensor | None) -> Fused:
        """Returns the operands of the fused pass for one bucket.

        The pass adds the gradient to ``held.residual`` and takes the selected pairs out.

        Args:
            held: the bucket's memory. The pass overwrites it.
            bucket: the gradient and its parameters. Neither is changed.
            scale: one float32 element by which the gradient is multiplied. None: 1.
        """

    def accumulate(self, operands: Fused) -> Selected:
        """Adds the gradient to the memory and selects nothing. Of the result, report and flags matter."""
        nothing = torch.empty(0, dtype=torch.int32, device=operands.grad.device)
        return ops.select_indices(operands, nothing)

    def restore(self, held: BucketMemory, pairs: SparseGrad) -> None:
        """Adds pairs that did not reach the model back to the residual."""
        ops.scatter_add(held.residual, pairs.values, pairs.indices)

    def mask_velocity(self, held: BucketMemory, contributed: SparseGrad) -> None:
        """Sets the velocity to zero at the places of ``contributed``, if factor masking is on."""

    @abstractmethod
    def undo(self, held: BucketMemory, operands: Fused, active: Tensor | None) -> None:
        """Takes the gradient out of the memory again, up to rounding. Its pairs must be restored before.

        Args:
            held: the bucket's memory.
            operands: of the pass that added the gradient.
            active: bool ``(parameters,)``: which parameters took part; None when all did.
        """
