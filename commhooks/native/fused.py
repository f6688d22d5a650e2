"""What kernels take and give: the operands of the fused pass, selections and merges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

#: Index of an unused place at the end of an index array (its value is 0).
PAD = 2**31 - 1


@dataclass(frozen=True)
class Fused:
    """Operands of one fused compensate pass over a flat gradient of ``n`` elements.

    Per element, each operation rounded to float32 on its own::

        g = float(grad) * (scale * scale_tensor)
        v = momentum * velocity + g        # without velocity: v = g
        c = residual + v                   # the corrected gradient; not finite: again with g = 0, and counted
        residual, velocity = c, v          # elements that are taken out leave residual = 0

    Attributes:
        grad: shape ``(n,)``, float32, bfloat16 or float16; only read.
        residual: shape ``(n,)``, float32; updated in place.
        velocity: shape ``(n,)``, float32, or None; updated in place.
        momentum: factor of the old velocity; must be 0 without ``velocity``.
        scale: factor of the gradient.
        scale_tensor: one float32 element on the same device, a further factor of the gradient, or None.
        segments: shape ``(s + 1,)``, int64, ascending offsets from 0 to n on the same device, or None. A
            segment (one parameter) whose gradient is exactly zero everywhere is inactive: its residual and
            velocity are not touched and nothing of it is selected. None: one segment that is always active.
    """

    grad: Tensor
    residual: Tensor
    velocity: Tensor | None = None
    momentum: float = 0.0
    scale: float = 1.0
    scale_tensor: Tensor | None = None
    segments: Tensor | None = None


class Selected(NamedTuple):
    """What was taken out, on the device of the operands.

    Attributes:
        values: shape ``(k,)``, float32.
        indices: shape ``(k,)``, int32, ascending, ``PAD`` at unused places.
        report: shape ``(3,)``, int64: pairs written before the padding, elements that were not finite,
            guesses that did not hold.
    """

    values: Tensor
    indices: Tensor
    report: Tensor

    @classmethod
    def empty(
        cls, k: int, device: torch.device, values: Tensor | None = None, indices: Tensor | None = None
    ) -> Selected:
        """Outputs of a selection of ``k`` places: the given tensors, and new uninitialised ones for None."""
        return cls(
            torch.empty(k, dtype=torch.float32, device=device) if values is None else values,
            torch.empty(k, dtype=torch.int32, device=device) if indices is None else indices,
            torch.empty(3, dtype=torch.int64, device=device),
        )


class Merged(NamedTuple):
    """The k largest magnitudes of the sum of two sparse gradients.

    Attributes:
        values: shape ``(k,)``, float32.
        indices: shape ``(k,)``, int32, ascending, ``PAD`` at unused places.
        survives_a: bool, as long as input a: whether the index of the entry is in the result (padding: False).
        survives_b: the same for input b.
    """

    values: Tensor
    indices: Tensor
    survives_a: Tensor
    survives_b: Tensor

    @classmethod
    def empty(cls, k: int, size_a: int, size_b: int, device: torch.device) -> Merged:
        """Uninitialised outputs of a merge of ``size_a`` and ``size_b`` places into ``k``."""
        return cls(
            torch.empty(k, dtype=torch.float32, device=device),
            torch.empty(k, dtype=torch.int32, device=device),
            torch.empty(size_a, dtype=torch.bool, device=device),
            torch.empty(size_b, dtype=torch.bool, device=device),
        )
