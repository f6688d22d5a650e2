"""``ErrorFeedback``: residual and velocity of every parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import says_what_to_write
from ..gradient.sparse_grad import SparseGrad
from ..native.fused import Fused
from .base import Memory
from .parameter_memory import BucketMemory, ParameterMemory


class ErrorFeedback(Memory):
    """Keeps what was not sent and adds it to the next gradient, optionally with momentum.

    Per parameter there is a residual ``u`` and, with momentum, a velocity ``v``, both float32. A step
    computes ``v <- momentum * v + g`` and ``c <- u + v``, and then ``u <- c`` where nothing was sent and 0
    elsewhere: Algorithm 1 of M-DSGD (Zhao, Gao, Li, arXiv:1905.12960). The memory belongs to parameters, not
    to bucket numbers, because DDP may change its bucket layout.

    Args:
        momentum: beta in [0, 1). With momentum here the optimizer's own momentum must be 0.
        factor_masking: set the velocity to zero where this rank's value contributed (section 3.1; Deep
            Gradient Compression). A step that sends everything (density 1, or the dense crossover) does not
            mask, because that would turn momentum off.
        clip_norm: largest L2 norm of this rank's gradient per bucket, before it enters the memory. Clip here
            and not the sparse average: what is cut off the average is in no rank's residual and is lost.
        rescale_with_lr: the optimizer. The residual is then constant in units of the parameters (eq. 3 and
            4): when a parameter group's learning rate changes, ``u <- (eta_{t-1} / eta_t) * u`` before use.
            A step with rate 0 does not rescale, and the rate before it is remembered.

    Raises:
        ValueError: a number out of range, or ``factor_masking`` without momentum.
        TypeError: ``rescale_with_lr`` is not an optimizer.
    """

    @says_what_to_write
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
        self.table = self.new_table()

    def new_table(self) -> ParameterMemory:
        return ParameterMemory(with_velocity=self.momentum > 0.0)

    def settings(self) -> dict[str, object]:
        return {
            "momentum": self.momentum,
            "factor_masking": self.factor_masking,
            "clip_norm": self.clip_norm,
            "rescale_with_lr": self.rescales,
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "optimizer": None}

    def operands(self, held: BucketMemory, grad: Tensor, *, scale: Tensor | None) -> Fused:
        factor, rescale = self._factor(grad, scale), self._rescale(held) if self.rescales else None
        return Fused(
            grad, held.residual, held.velocity, self.momentum, 1.0, factor, held.segments, rescale=rescale
        )

    def mask_velocity(self, held: BucketMemory, contributed: SparseGrad) -> None:
        if self.factor_masking and held.velocity is not None:
            held.velocity[contributed.indices[contributed.used].long()] = 0.0

    def undo(self, held: BucketMemory, operands: Fused, active: Tensor | None) -> None:
        if held.recall():
            return
        gradient = _scaled(operands.grad, operands.scale_tensor)
        gradient[~gradient.isfinite()] = 0.0
        mask = held.mask(active)
        if held.velocity is None:
            held.residual.sub_(gradient if mask is None else gradient * mask)
            return
        before = (held.velocity - gradient) / self.momentum
        if mask is None:
            held.residual.sub_(held.velocity)
            held.velocity.copy_(before)
        else:
            held.residual.sub_(held.velocity * mask)
            held.velocity.copy_(torch.where(mask, before, held.velocity))

    def _factor(self, grad: Tensor, scale: Tensor | None) -> Tensor | None:
        """Returns ``scale`` times the clipping factor, or None for 1.

        It is a tensor of one element on the gradient's device, so that the host need not wait for the norm.
        """
        if self.clip_norm is None:
            return scale
        norm = torch.linalg.vector_norm(grad, dtype=torch.float32)
        if scale is not None:
            norm = norm * scale.reshape(())
        clip: Tensor = (self.clip_norm / norm).clamp(max=1.0).nan_to_num(1.0).reshape(1)
        return clip if scale is None else clip * scale

    def _rescale(self, held: BucketMemory) -> Tensor | None:
        """Returns each parameter's last learning rate over its present one, float32; None when all are 1."""
        if self.optimizer is None:
            raise ValueError(
                "rescale_with_lr: an optimizer is not pickled; set memory.optimizer again after loading"
            )
        rates = {p: float(g["lr"]) for g in self.optimizer.param_groups for p in g["params"]}
        factors = [1.0] * len(held.keys)
        for position, key in enumerate(held.keys):
            rate = rates.get(key)
            if rate is None:
                raise ValueError(f"rescale_with_lr: {self.table.name_of(key)} is not in the given optimizer")
            if rate != 0.0:
                factors[position] = self.table.last_lr.get(key, rate) / rate
                self.table.last_lr[key] = rate
        if all(factor == 1.0 for factor in factors):
            return None
        return torch.tensor(factors, dtype=torch.float32, device=held.residual.device)


def _scaled(grad: Tensor, scale: Tensor | None) -> Tensor:
    """Returns a float32 copy of ``grad`` times ``scale``."""
    gradient = grad.to(torch.float32, copy=True)
    return gradient if scale is None else gradient * scale
