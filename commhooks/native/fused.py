"""Operands and results of the kernels: the fused pass, selections and merges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

#: Index of an unused place at the end of an index array. The value at an unused place is 0.
PAD = 2**31 - 1


@dataclass(frozen=True)
class Fused:
    """Operands of one fused pass that corrects a flat gradient of ``n`` elements.

    The pass computes this per element. Each operation is rounded to float32. Where ``c`` is not finite, the
    element is counted and computed again with ``g = 0``::

        g = float(grad) * (scale * scale_tensor)
        v = momentum * velocity + g        # without velocity: v = g
        u = rescale[segment] * residual    # without rescale: u = residual
        c = u + v                          # the corrected gradient
        residual_out, velocity_out = c, v  # residual_out = 0 where the element is taken out

    Attributes:
        grad: shape ``(n,)``, float32, bfloat16 or float16. It is only read.
        residual: shape ``(n,)``, float32, updated in place, or only read when ``residual_out`` is given.
        velocity: shape ``(n,)``, float32, or None. Updated in place, or only read when ``velocity_out`` is
            given.
        momentum: factor of the old velocity. It must be 0 without ``velocity``.
        scale: factor of the gradient.
        scale_tensor: one float32 element on the same device, a further factor of the gradient, or None.
        segments: shape ``(s + 1,)``, int64, ascending offsets from 0 to n on the same device, or None. A
            segment (one parameter) whose gradient is exactly zero everywhere is inactive: none of its
            elements is taken out, ``residual_out = u`` and ``velocity_out = velocity``. None: one segment
            that is always active.
        residual_out: shape ``(n,)``, float32: where the new residual goes. None: in place.
        velocity_out: shape ``(n,)``, float32: where the new velocity goes. It needs ``velocity``. None:
            in place.
        rescale: shape ``(s,)``, float32 on the same device: a factor of the residual for each segment. Shape
            ``(1,)`` without segments. None: no factor.
    """

    grad: Tensor
    residual: Tensor
    velocity: Tensor | None = None
    momentum: float = 0.0
    scale: float = 1.0
    scale_tensor: Tensor | None = None
    segments: Tensor | None = None
    residual_out: Tensor | None = None
    velocity_out: Tensor | None = None
    rescale: Tensor | None = None

    @property
    def new_residual(self) -> Tensor:
        """The tensor that holds the residual after the pass."""
        return self.residual if self.residual_out is None else self.residual_out

    @property
    def new_velocity(self) -> Tensor | None:
        """The tensor that holds the velocity after the pass, or None."""
        return self.velocity if self.velocity_out is None else self.velocity_out

    @property
    def num_segments(self) -> int:
        """Number of segments: 0 when ``segments`` is None."""
        return 0 if self.segments is None else self.segments.numel() - 1


class Selected(NamedTuple):
    """The pairs that a selection took out of the residual, on the device of the operands.

    Attributes:
        values: shape ``(k,)``, float32.
        indices: shape ``(k,)``, int32, ascending, ``PAD`` at unused places.
        report: shape ``(4,)``, int64: number of pairs before the padding, of elements that were not finite,
            of guessed thresholds that missed, and of elements in inactive segments.
        active: shape ``(s,)``, bool: which segments are active. None without segments.
    """

    values: Tensor
    indices: Tensor
    report: Tensor
    active: Tensor | None

    @classmethod
    def empty(
        cls, fused: Fused, k: int, values: Tensor | None = None, indices: Tensor | None = None
    ) -> Selected:
        """Outputs for a selection of ``k`` places: the given tensors, and uninitialised ones for None."""
        device, segments = fused.residual.device, fused.num_segments
        return cls(
            torch.empty(k, dtype=torch.float32, device=device) if values is None else values,
            torch.empty(k, dtype=torch.int32, device=device) if indices is None else indices,
            torch.empty(4, dtype=torch.int64, device=device),
            torch.empty(segments, dtype=torch.bool, device=device) if segments else None,
        )


class Merged(NamedTuple):
    """The k largest magnitudes of the sum of two sparse gradients.

    Attributes:
        values: shape ``(k,)``, float32.
        indices: shape ``(k,)``, int32, ascending, ``PAD`` at unused places.
        survives_a: shape ``(k_a,)``, bool: whether the index of each entry of input a is in the result. False
            for padding.
        survives_b: the same for input b.
    """

    values: Tensor
    indices: Tensor
    survives_a: Tensor
    survives_b: Tensor

    @classmethod
    def empty(
        cls,
        k: int,
        size_a: int,
        size_b: int,
        device: torch.device,
        values: Tensor | None = None,
        indices: Tensor | None = None,
    ) -> Merged:
        """Outputs for a merge of ``size_a`` and ``size_b`` places into ``k``: given, or uninitialised."""
        return cls(
            torch.empty(k, dtype=torch.float32, device=device) if values is None else values,
            torch.empty(k, dtype=torch.int32, device=device) if indices is None else indices,
            torch.empty(size_a, dtype=torch.bool, device=device),
            torch.empty(size_b, dtype=torch.bool, device=device),
        )
