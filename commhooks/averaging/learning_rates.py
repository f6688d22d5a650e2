"""The learning rates of the papers' theorems, as torch LR schedulers.

Each sets the same absolute rate in every parameter group, whatever rate the optimizer was made with.
``last_epoch`` counts calls of ``scheduler.step()``, that is optimizer steps, from 0.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from .sync_sets import positive_int


def _positive(name: str, value: float) -> float:
    if not 0.0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value!r}")
    return float(value)


def check_fraction(name: str, value: float) -> float:
    """Returns ``value`` as float, or raises ``ValueError`` when it is not in [0, 1)."""
    if not isinstance(value, (int, float)) or not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {value!r}")
    return float(value)


class ClosedFormLR(LRScheduler, ABC):
    """Base of schedulers whose rate is a function of the step alone. Their state is ``last_epoch``."""

    @abstractmethod
    def rate(self, step: int) -> float:
        """Returns the learning rate of optimizer step ``step``, from 0."""

    def get_lr(self) -> list[Any]:
        return [self.rate(self.last_epoch)] * len(self.optimizer.param_groups)


class LocalSGDLR(ClosedFormLR):
    """``eta_t = 4 / (mu (a + t))``, t from 0 (Local SGD, arXiv:1805.09767, Theorem 2.2).

    Args:
        optimizer: the optimizer to drive.
        strong_convexity: mu of the objective.
        shift: a (see :func:`suggest_shift`).
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, strong_convexity: float, shift: float, last_epoch: int = -1
    ) -> None:
        self.strong_convexity = _positive("strong_convexity", strong_convexity)
        self.shift = _positive("shift", shift)
        super().__init__(optimizer, last_epoch)

    def rate(self, step: int) -> float:
        return 4.0 / (self.strong_convexity * (self.shift + step))


def suggest_shift(condition_number: float, period: int) -> float:
    """Returns the smallest shift the proof allows, ``max(16 * kappa, H)``.

    Theorem 2.2 prints ``max(4 kappa, H / mu)``. Its own Lemma 3.1 needs ``eta_t <= 1 / (4 L)``, which is 16
    kappa.
    """
    if not condition_number >= 1.0:
        raise ValueError(f"condition_number must be at least 1, got {condition_number!r}")
    return max(16.0 * condition_number, float(positive_int("period", period)))


class StronglyConvexLR(ClosedFormLR):
    """``eta_t = (1 - beta t / (t + 1)) / (mu t)``, t from 1 (M-DSGD, arXiv:1905.12960, Theorem 8).

    The theorem is about the average of the last ceil(T/2) iterates: :class:`~commhooks.averaging.LastHalf`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        strong_convexity: float,
        beta: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        self.strong_convexity = _positive("strong_convexity", strong_convexity)
        self.beta = check_fraction("beta", beta)
        super().__init__(optimizer, last_epoch)

    def rate(self, step: int) -> float:
        t = step + 1
        return (1.0 - self.beta * t / (t + 1)) / (self.strong_convexity * t)


class ConvexLR(ClosedFormLR):
    """``scale (1 - beta sqrt((t + 1) / (t + 2))) / sqrt(t + 1)``, t from 0 (M-DSGD, Theorem 9: scale 1)."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, beta: float = 0.0, scale: float = 1.0, last_epoch: int = -1
    ) -> None:
        self.beta = check_fraction("beta", beta)
        self.scale = _positive("scale", scale)
        super().__init__(optimizer, last_epoch)

    def rate(self, step: int) -> float:
        return self.scale * (1.0 - self.beta * math.sqrt((step + 1) / (step + 2))) / math.sqrt(step + 1)


class NonConvexLR(ClosedFormLR):
    """The constant ``scale / sqrt(T)`` (M-DSGD, Theorem 10)."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, total_steps: int, scale: float = 1.0, last_epoch: int = -1
    ) -> None:
        self.total_steps = positive_int("total_steps", total_steps)
        self.scale = _positive("scale", scale)
        super().__init__(optimizer, last_epoch)

    def rate(self, step: int) -> float:
        return self.scale / math.sqrt(self.total_steps)


class PowerLR(ClosedFormLR):
    """``eta_t = scale (1 / t^alpha - beta / (t + 1)^alpha)``, t from 1, alpha in [0.5, 1].

    Source: M-DSGD, arXiv:1905.12960, section 5, the second strategy below Lemma 6. The printed ``rho_t`` and
    ``eta_t - rho_t`` are misprints (a factor beta is wrong). The rate itself is as printed.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        alpha: float = 0.5,
        beta: float = 0.0,
        scale: float = 1.0,
        last_epoch: int = -1,
    ) -> None:
        if not 0.5 <= alpha <= 1.0:
            raise ValueError(f"alpha must be in [0.5, 1], got {alpha!r}")
        self.alpha, self.beta, self.scale = (
            float(alpha),
            check_fraction("beta", beta),
            _positive("scale", scale),
        )
        super().__init__(optimizer, last_epoch)

    def rate(self, step: int) -> float:
        t = step + 1
        return self.scale * (float(t**-self.alpha) - self.beta * float((t + 1) ** -self.alpha))
