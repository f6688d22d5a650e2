"""Memory: what a rank withholds from the average, per parameter, until it is sent.

Conservation is its law. ``select`` adds the gradient and takes pairs out; whatever does not reach the model
comes back by ``restore``; ``undo`` takes a gradient out again whose step is thrown away. Nothing else changes
a residual.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from .bucket import Bucket
from .native import ops
from .native.fused import Fused, Selected
from .selectors import Selector
from .slots import Slot, SlotTable
from .sparse import SparseGrad


class Memory(ABC):
    """How gradients are corrected before selection. One instance serves one Reducer."""

    table: SlotTable

    def __getstate__(
        self,
    ) -> dict[str, Any]:  # parameters are never pickled; a state's dict carries what they own
        return {**self.__dict__, "table": SlotTable(self.table.with_velocity)}

    @abstractmethod
    def slot(self, bucket: Bucket) -> tuple[Slot, bool]:
        """The bucket's flat memory, and whether its layout is new; carried over by parameter when it
        changed."""

    @abstractmethod
    def describe(self) -> str:
        """Settings that all ranks must share, in one line."""

    @abstractmethod
    def select(
        self,
        slot: Slot,
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
    def accumulate(self, slot: Slot, grad: Tensor, *, scale: Tensor | None) -> int:
        """Corrects ``grad`` into the slot's residual and takes nothing out; returns the non-finite count."""

    def restore(self, slot: Slot, pairs: SparseGrad) -> None:
        """Puts pairs back that did not reach the model."""
        ops.scatter_add(slot.residual, pairs.values, pairs.indices)

    def mask_velocity(self, slot: Slot, contributed: SparseGrad | None) -> None:
        """Momentum factor masking at what contributed, when it is on."""

    @abstractmethod
    def undo(self, slot: Slot, grad: Tensor, *, scale: Tensor | None) -> None:
        """Takes ``grad`` out of the slot again, to rounding, after every pair it gave was restored."""


class ErrorFeedback(Memory):
    """Residual ``u`` and optional velocity ``v``, both float32, per parameter.

    ``v <- momentum * v + g``, ``c <- u + v``, ``u <- c`` where not sent: Algorithm 1 of M-DSGD (Zhao, Gao,
    Li, arXiv:1905.12960). The memory belongs to parameters, not bucket numbers: DDP may re-lay its buckets at
    any time.

    Args:
        momentum: beta in [0, 1). With momentum here the optimizer's own momentum must be 0.
        factor_masking: zero the velocity where a value contributed (section 3.1; Deep Gradient Compression).
            Not done at a step that sends everything (density 1, or the dense crossover): there it would turn
            momentum off.
        clip_norm: largest L2 norm of this rank's gradient per bucket, before it enters the memory. Clip here
            and not the sparse average afterwards: what is cut off an average is in nobody's residual.
        rescale_with_lr: an optimizer; the residual is then kept in parameter units (eq. 3 and 4): in gradient
            units ``u <- (eta_{t-1} / eta_t) * u`` before it is used, by parameter group. A rate of 0 keeps
            the last.
    """

    def __init__(
        self,
        momentum: float = 0.0,
        *,
        factor_masking: bool = False,
        clip_norm: float | None = None,
        rescale_with_lr: torch.optim.Optimizer | None = None,
    ) -> None:
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum must be in [0, 1), got {momentum!r}")
        if factor_masking and momentum == 0.0:
            raise ValueError("factor_masking=True masks the velocity and needs momentum > 0")
        if clip_norm is not None and not clip_norm > 0.0:
            raise ValueError(f"clip_norm must be positive, got {clip_norm!r}")
        if rescale_with_lr is not None and not hasattr(rescale_with_lr, "param_groups"):
            raise TypeError(f"rescale_with_lr must be an optimizer, got {type(rescale_with_lr).__name__}")
        self.momentum, self.factor_masking, self.clip_norm = float(momentum), factor_masking, clip_norm
        self.optimizer, self.rescales = rescale_with_lr, rescale_with_lr is not None
        self.table = SlotTable(with_velocity=momentum > 0.0)

    def describe(self) -> str:
        return (
            f"ErrorFeedback(momentum={self.momentum!r}, factor_masking={self.factor_masking}, "
            f"clip_norm={self.clip_norm}, rescale_with_lr={self.rescales})"
        )

    __repr__ = describe

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "optimizer": None}

    def slot(self, bucket: Bucket) -> tuple[Slot, bool]:
        slot, is_new = self.table.slot(bucket)
        if self.rescales:
            self._follow_lr(slot)
        return slot, is_new

    def select(
        self,
        slot: Slot,
        grad: Tensor,
        selector: Selector,
        k: int,
        *,
        scale: Tensor | None,
        step: int,
        stream: int,
    ) -> Selected:
        return selector.select(self._fused(slot, grad, scale), k, step=step, stream=stream)

    def accumulate(self, slot: Slot, grad: Tensor, *, scale: Tensor | None) -> int:
        nothing = torch.empty(0, dtype=torch.int32, device=grad.device)
        return int(ops.select_indices(self._fused(slot, grad, scale), nothing).report[1])

    def mask_velocity(self, slot: Slot, contributed: SparseGrad | None) -> None:
        if self.factor_masking and slot.velocity is not None and contributed is not None:
            slot.velocity[contributed.indices[contributed.used].long()] = 0.0

    def undo(self, slot: Slot, grad: Tensor, *, scale: Tensor | None) -> None:
        gradient = _scaled(grad, self._scale(slot, grad, scale))
        gradient[~gradient.isfinite()] = 0.0
        active = slot.active(grad)
        if slot.velocity is None:
            slot.residual.sub_(gradient if active is None else gradient * active)
            return
        before = (slot.velocity - gradient) / self.momentum
        if active is None:
            slot.residual.sub_(slot.velocity)
            slot.velocity.copy_(before)
        else:
            slot.residual.sub_(slot.velocity * active)
            slot.velocity.copy_(torch.where(active, before, slot.velocity))

    def _fused(self, slot: Slot, grad: Tensor, scale: Tensor | None) -> Fused:
        scale = self._scale(slot, grad, scale)
        return Fused(grad, slot.residual, slot.velocity, self.momentum, 1.0, scale, slot.segments)

    def _scale(self, slot: Slot, grad: Tensor, scale: Tensor | None) -> Tensor | None:
        """The given scale times what clipping asks for: one element, so that no device is waited for."""
        if self.clip_norm is None:
            return scale
        norm = torch.linalg.vector_norm(grad, dtype=torch.float32)
        if scale is not None:
            norm = norm * scale.reshape(())
        clip: Tensor = (self.clip_norm / norm).clamp(max=1.0).nan_to_num(1.0).reshape(1)
        return clip if scale is None else clip * scale

    def _follow_lr(self, slot: Slot) -> None:
        """Multiplies residuals by (last rate / present rate), parameter by parameter."""
        if self.optimizer is None:
            raise ValueError(
                "rescale_with_lr: an optimizer is not pickled; set memory.optimizer again after loading"
            )
        rates = {p: float(g["lr"]) for g in self.optimizer.param_groups for p in g["params"]}
        for key, view in zip(slot.keys, slot.residual_views(), strict=True):
            rate = rates.get(key)
            if rate is None:
                raise ValueError(f"rescale_with_lr: {self.table.name_of(key)} is not in the given optimizer")
            last = self.table.last_lr.get(key)
            if rate != 0.0:
                if last is not None and last != rate:
                    view.mul_(last / rate)
                self.table.last_lr[key] = rate


class NoMemory(Memory):
    """No error feedback: what is not sent is lost, against the conservation law. For comparisons."""

    def __init__(self) -> None:
        self.table = SlotTable(with_velocity=False, with_residual=False)

    def describe(self) -> str:
        return "NoMemory()"

    __repr__ = describe

    def slot(self, bucket: Bucket) -> tuple[Slot, bool]:
        slot, is_new = self.table.slot(bucket)
        slot.residual.zero_()
        return slot, is_new

    def select(
        self,
        slot: Slot,
        grad: Tensor,
        selector: Selector,
        k: int,
        *,
        scale: Tensor | None,
        step: int,
        stream: int,
    ) -> Selected:
        return selector.select(Fused(grad, slot.residual, scale_tensor=scale), k, step=step, stream=stream)

    def accumulate(self, slot: Slot, grad: Tensor, *, scale: Tensor | None) -> int:
        nothing = torch.empty(0, dtype=torch.int32, device=grad.device)
        return int(ops.select_indices(Fused(grad, slot.residual, scale_tensor=scale), nothing).report[1])

    def undo(self, slot: Slot, grad: Tensor, *, scale: Tensor | None) -> None:
        slot.residual.zero_()


def _scaled(grad: Tensor, scale: Tensor | None) -> Tensor:
    gradient = grad.to(torch.float32, copy=True)
    return gradient if scale is None else gradient * scale
