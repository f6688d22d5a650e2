"""``ErrorFeedback``: residual and velocity of every parameter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..errors import says_what_to_write
from ..gradient.bucket import Bucket
from ..gradient.sparse_grad import SparseGrad
from ..native.fused import Fused
from .base import Memory
from .clipping import Clip
from .parameter_memory import BucketMemory, ParameterMemory


class ErrorFeedback(Memory):
    """Keeps what was not sent and adds it to the next gradient, optionally with momentum.

    Per parameter ``w`` there is a residual ``u`` and, with momentum, a velocity ``v``, both float32. A step
    computes::

        g = clip(grad) + weight_decay * w
        v = momentum * v + g
        c = u + v              # with nesterov: u + g + momentum * v
        u = c                  # 0 where an element is sent

    This is Algorithm 1 of M-DSGD (Zhao, Gao, Li, arXiv:1905.12960), whose equations and sections are quoted
    below. At density 1 the averages are the updates of ``torch.optim.SGD`` with the same momentum,
    ``nesterov`` and weight decay.

    Several backward passes may belong to one optimizer step (``Bucket.same_step``). Velocity and decay are
    then those of the gradients' sum. The later passes compute ``v = v + g`` and ``c = u + g``, with
    ``nesterov`` ``c = u + (1 + momentum) * g``, and add no weight decay.

    The memory belongs to parameters, not to bucket numbers, because DDP may change its bucket layout.

    Args:
        momentum: beta in [0, 1). With momentum here the optimizer's own momentum must be 0.
        nesterov: Nesterov's form of the momentum. The velocity that is kept is ``(1 + momentum) * v``. A step
            costs one more pass over residual and velocity.
        weight_decay: factor of the L2 term, at least 0, for all parameters or by parameter. The optimizer's
            own must be 0. Under DDP the term enters on ranks where a backward pass reached the parameter. A
            step costs a float32 copy of the gradient, and one more pass over it and the parameters.
        factor_masking: set the velocity to zero where this rank's value contributed (section 3.1; Deep
            Gradient Compression). A step that sends everything (density 1, or the dense crossover) does not
            mask, because that would turn momentum off.
        clip_norm: largest L2 norm of this rank's gradient, before it enters the memory. Clip here and not
            the sparse average: what is cut off the average is in no rank's residual and is lost.
        norm_over: ``"bucket"``: each bucket is clipped by its own norm. ``"model"``: all are clipped by the
            norm of all of this rank's gradients. The buckets then wait for the last one, so that no
            communication hides behind backward.
        rescale_with_lr: the optimizer. The residual is then constant in units of the parameters (eq. 3 and
            4): when a parameter group's learning rate changes, ``u <- (eta_{t-1} / eta_t) * u`` before use.
            At rate 0 a parameter takes no part in the step: its gradient does not count, nothing is sent,
            and the rate before is remembered.

    Raises:
        ValueError: a number out of range, or ``factor_masking`` or ``nesterov`` without momentum.
        TypeError: ``rescale_with_lr`` is not an optimizer.
    """

    norm_over: str = "bucket"
    _clip: Clip | None = None
    nesterov: bool = False
    weight_decay: float | Mapping[Tensor, float] | None = 0.0
    _places: Mapping[int, tuple[int, int]] = MappingProxyType({})
    """By id of a parameter: its group in the optimizer of ``rescale_with_lr``, and its position there."""

    @says_what_to_write
    def __init__(
        self,
        momentum: float = 0.0,
        *,
        nesterov: bool = False,
        weight_decay: float | Mapping[Tensor, float] = 0.0,
        factor_masking: bool = False,
        clip_norm: float | None = None,
        norm_over: str = "bucket",
        rescale_with_lr: torch.optim.Optimizer | None = None,
    ) -> None:
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum must be in [0, 1), got {momentum!r}")
        if factor_masking and momentum == 0.0:
            raise ValueError("factor_masking=True masks the velocity and needs momentum > 0")
        if nesterov and momentum == 0.0:
            raise ValueError("nesterov=True is a form of momentum and needs momentum > 0")
        if clip_norm is None and norm_over != "bucket":
            raise ValueError(f"norm_over={norm_over!r} says how to clip and needs clip_norm")
        if rescale_with_lr is not None and not hasattr(rescale_with_lr, "param_groups"):
            raise TypeError(f"rescale_with_lr must be an optimizer, got {type(rescale_with_lr).__name__}")
        self.momentum, self.factor_masking, self.clip_norm = float(momentum), factor_masking, clip_norm
        self.norm_over, self._clip = norm_over, None if clip_norm is None else Clip(clip_norm, norm_over)
        self.nesterov, self.weight_decay = bool(nesterov), _checked_decay(weight_decay)
        self.optimizer, self.rescales = rescale_with_lr, rescale_with_lr is not None
        self.table = self.new_table()

    def optimizer_was_wrapped(self, optimizer: torch.optim.Optimizer, wrapped: torch.optim.Optimizer) -> None:
        """Reads learning rates off ``wrapped`` from now on, where they were read off ``optimizer``."""
        if self.optimizer is optimizer:
            self.optimizer = wrapped

    def new_table(self) -> ParameterMemory:
        return ParameterMemory(with_velocity=self.momentum > 0.0)

    def settings(self) -> dict[str, object]:
        return {
            "momentum": self.momentum,
            "nesterov": self.nesterov,
            "weight_decay": _shown_decay(self.weight_decay),
            "factor_masking": self.factor_masking,
            "clip_norm": self.clip_norm,
            "norm_over": self.norm_over,
            "rescale_with_lr": self.rescales,
        }

    def __getstate__(self) -> dict[str, Any]:
        # Parameters are never pickled.
        decay = None if isinstance(self.weight_decay, Mapping) else self.weight_decay
        given: dict[str, Any] = {"optimizer": None, "weight_decay": decay, "_places": {}}
        return {**super().__getstate__(), **given}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.clip_norm is not None and self._clip is None:  # pickled by version 0.1
            self._clip = Clip(self.clip_norm, self.norm_over)

    @property
    def clips_model(self) -> bool:
        """Whether gradients are clipped by the norm of the whole step (``Bucket.step_norm``)."""
        return self.norm_over == "model"

    @property
    def decays(self) -> bool:
        """Whether the memory adds weight decay, for which it reads the parameters' values."""
        return self.weight_decay != 0.0

    def operands(self, held: BucketMemory, bucket: Bucket, *, scale: Tensor | None) -> Fused:
        held.begin(bucket.same_step)
        grad, factor = bucket.buffer, scale
        if self._clip is not None:
            factor = self._clip.factor(held, bucket, scale)
        if self.decays:
            grad, factor = self._with_decay(held, bucket, factor), None
        rescale, resting = self._rescale(held) if self.rescales else (None, [])
        if resting:
            grad = grad.clone() if grad is bucket.buffer else grad
            for position in resting:
                held.view(grad, position).zero_()
        gain = 1.0 + self.momentum if self.nesterov else 1.0  # see _shifted()
        operands = Fused(
            grad, held.residual, held.velocity, self.momentum, gain, factor, held.segments, rescale=rescale
        )
        if held.velocity is not None and (self.nesterov or held.again):
            operands = self._shifted(held, held.velocity, operands)
        return operands

    def mask_velocity(self, held: BucketMemory, contributed: SparseGrad) -> None:
        if self.factor_masking and held.velocity is not None:
            held.velocity[contributed.indices[contributed.used].long()] = 0.0

    def undo(self, held: BucketMemory, operands: Fused, active: Tensor | None) -> None:
        held.end(torch.zeros_like(held.entered))
        if self.table.recall(held):
            return
        gradient = _scaled(operands.grad, operands.scale_tensor).mul_(operands.scale)
        gradient[~gradient.isfinite()] = 0.0
        mask = held.mask(active)
        if held.velocity is None:
            held.residual.sub_(gradient if mask is None else gradient * mask)
            return
        before = (held.velocity - gradient) / self.momentum
        added = held.velocity - self._nesterov_share * before
        for position in held.again:
            same = held.view(gradient, position)
            held.view(added, position).copy_(same)
            held.view(before, position).copy_(held.view(held.velocity, position) - same)
        if mask is None:
            held.residual.sub_(added)
            held.velocity.copy_(before)
        else:
            held.residual.sub_(added * mask)
            held.velocity.copy_(torch.where(mask, before, held.velocity))

    @property
    def _nesterov_share(self) -> float:
        """The share of the old velocity that Nesterov's form takes off the corrected gradient."""
        return self.momentum / (1.0 + self.momentum) if self.nesterov else 0.0

    def _shifted(self, held: BucketMemory, velocity: Tensor, operands: Fused) -> Fused:
        """Returns operands with which the pass computes Nesterov's form, and later passes of a step.

        The pass multiplies the gradient by ``1 + momentum`` in Nesterov's form, with
        ``w = (1 + momentum) * v`` in the place of the velocity. Nesterov's ``c = u + g + momentum * v`` then
        is ``(u - momentum / (1 + momentum) * w_before) + w``. A later pass of the same step adds the gradient
        alone: from ``velocity / momentum`` and ``u - velocity`` the pass computes ``velocity + g`` and
        ``u + g``. Where a parameter is inactive, its memory stays as it is.

        The pass multiplies the residual by ``rescale`` afterwards.
        """
        positions, numels, n = range(len(held.keys)), held.segments.diff(), operands.grad.numel()
        active = torch.stack([held.view(operands.grad, position).any() for position in positions])
        share = (active * -self._nesterov_share).to(torch.float32)
        again = active & held.flags(held.again) if held.again else None
        if again is not None:
            share[again] = -1.0
        if operands.rescale is not None:
            share = share / operands.rescale
        every = share.repeat_interleave(numels, output_size=n)
        residual = operands.residual.addcmul(velocity, every)
        operands = replace(operands, residual=residual, residual_out=operands.residual)
        if again is None:
            return operands
        divisor = torch.where(again, self.momentum, 1.0).to(torch.float32)
        before = velocity / divisor.repeat_interleave(numels, output_size=n)
        return replace(operands, velocity=before, velocity_out=velocity)

    def _with_decay(self, held: BucketMemory, bucket: Bucket, factor: Tensor | None) -> Tensor:
        """Returns ``factor * gradient + weight_decay * parameter``, shape ``(n,)``, float32."""
        grad = _scaled(bucket.buffer, factor)
        for position, values in bucket.weights():
            decay = self._decay_of(held.keys[position])
            if decay and position not in held.again:
                held.view(grad, position).add_(values, alpha=decay)
        return grad

    def _decay_of(self, parameter: Any) -> float:
        if isinstance(self.weight_decay, float):
            return self.weight_decay
        if self.weight_decay is None:
            raise ValueError(
                "weight_decay by parameter is not pickled; set memory.weight_decay again after loading"
            )
        if parameter not in self.weight_decay:
            raise ValueError(f"weight_decay: {self.table.name_of(parameter)} is not among its parameters")
        return self.weight_decay[parameter]

    def _rescale(self, held: BucketMemory) -> tuple[Tensor | None, list[int]]:
        """Returns the factors of the residual, and the positions of parameters with rate 0.

        A factor is a parameter's last learning rate over its present one, float32; None when all are 1.
        """
        if self.optimizer is None:
            raise ValueError(
                "rescale_with_lr: an optimizer is not pickled; set memory.optimizer again after loading"
            )
        groups, factors, resting = self.optimizer.param_groups, [1.0] * len(held.keys), []
        for position, key in enumerate(held.keys):
            rate = self._rate_of(key, groups)
            if rate == 0.0:
                resting.append(position)
            else:
                factors[position] = self.table.last_lr.get(key, rate) / rate
                self.table.last_lr[key] = rate
        if all(factor == 1.0 for factor in factors):
            return None, resting
        return torch.tensor(factors, dtype=torch.float32, device=held.residual.device), resting

    def _rate_of(self, key: Hashable, groups: list[dict[str, Any]]) -> float:
        """Returns the learning rate of a parameter's group.

        Raises:
            ValueError: the optimizer does not hold the parameter.
        """
        if not _is_at(self._places.get(id(key)), key, groups):  # the groups have changed: go through them all
            self._places = {id(p): (i, j) for i, g in enumerate(groups) for j, p in enumerate(g["params"])}
            if id(key) not in self._places:
                raise ValueError(f"rescale_with_lr: {self.table.name_of(key)} is not in the given optimizer")
        return float(groups[self._places[id(key)][0]]["lr"])


def _is_at(place: tuple[int, int] | None, key: Hashable, groups: list[dict[str, Any]]) -> bool:
    """Whether a parameter is in the group, and there at the position, that ``place`` says."""
    if place is None or place[0] >= len(groups):
        return False
    parameters = groups[place[0]]["params"]
    return place[1] < len(parameters) and parameters[place[1]] is key


def _scaled(grad: Tensor, scale: Tensor | None) -> Tensor:
    """Returns a float32 copy of ``grad`` times ``scale``."""
    gradient = grad.to(torch.float32, copy=True)
    return gradient if scale is None else gradient * scale


def _checked_decay(decay: float | Mapping[Tensor, float]) -> float | Mapping[Tensor, float]:
    """Returns a number as float, and a mapping as a dict of floats.

    Raises:
        ValueError: a number is negative or not finite.
    """
    numbers = list(decay.values()) if isinstance(decay, Mapping) else [decay]
    for number in numbers:
        if not isinstance(number, (int, float)) or not 0.0 <= number < float("inf"):
            raise ValueError(f"weight_decay must be at least 0 and finite, got {number!r}")
    if isinstance(decay, Mapping):
        return {parameter: float(number) for parameter, number in decay.items()}
    return float(decay)


def _shown_decay(decay: float | Mapping[Tensor, float] | None) -> object:
    """Returns the number, or how many parameters have which number."""
    if not isinstance(decay, Mapping):
        return decay
    counts = sorted(Counter(decay.values()).items())
    return ", ".join(f"{number:g} for {count}" for number, count in counts)
