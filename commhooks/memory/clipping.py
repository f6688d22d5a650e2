"""``Clip``: scales a gradient down to a largest norm before it enters a memory."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch import Tensor

from ..gradient.bucket import Bucket
from .parameter_memory import BucketMemory

OVER = ("bucket", "model")
_TINY = 1e-3
_STEPS = 20
_CUT_OFF = (
    "clip_norm={bound:g} removed more than 99.9 % of this rank's gradient in {steps} steps running (the "
    "norm is about {norm:.3g} now): the model hardly changes. Where a GradScaler scales the loss, pass it to "
    "the state: SparseState(..., grad_scaler=scaler). Else raise clip_norm"
)


class Clip:
    """Scales gradients so that their L2 norm is at most ``bound``.

    Warns once when nearly everything of a bucket is cut off in 20 steps running.

    Args:
        bound: positive.
        over: ``"bucket"``: each bucket by its own norm. ``"model"``: all buckets of a step by the norm of all
            of this rank's gradients (:attr:`Bucket.step_norm`).

    Raises:
        ValueError: ``bound`` is not positive, or ``over`` is neither.
    """

    _last: tuple[weakref.ref[BucketMemory], Tensor] | None
    _told: bool

    def __init__(self, bound: float, over: str) -> None:
        if not bound > 0.0:
            raise ValueError(f"clip_norm must be positive, got {bound!r}")
        if over not in OVER:
            raise ValueError(f"norm_over must be one of {OVER}, got {over!r}")
        self.bound, self.over = bound, over
        self._start()

    def factor(self, held: BucketMemory, bucket: Bucket, scale: Tensor | None) -> Tensor:
        """Returns the clipping factor, times ``scale`` if there is one.

        It is a tensor of one element on the gradient's device, so that the host need not wait for the norm.

        Raises:
            ValueError: the norm of the whole step is wanted and unknown.
        """
        if self.over == "bucket":
            norm = torch.linalg.vector_norm(bucket.buffer, dtype=torch.float32)
        else:
            if bucket.step_norm is None:
                raise ValueError(
                    "norm_over='model' needs all gradients of a step at once: it goes with SparseState "
                    "under DDP and with commhooks.horovod.DistributedOptimizer"
                )
            norm = bucket.step_norm.to(bucket.buffer.device)
        if scale is not None:
            norm = norm * scale.reshape(())
        clip: Tensor = (self.bound / norm).clamp(max=1.0).nan_to_num(1.0).reshape(1)
        self._look(held, clip)
        return clip if scale is None else clip * scale

    def _look(self, held: BucketMemory, clip: Tensor) -> None:
        """Counts the factor of the call before, whose result the device has by now."""
        before, self._last = self._last, (weakref.ref(held), clip)
        bucket = None if before is None else before[0]()
        if before is None or bucket is None or self._told:
            return
        factor = float(before[1])
        streak = self._streaks[bucket] = self._streaks.get(bucket, 0) + 1 if factor < _TINY else 0
        if streak >= _STEPS:
            self._told = True
            norm = self.bound / factor if factor else float("inf")
            warnings.warn(_CUT_OFF.format(bound=self.bound, steps=streak, norm=norm), stacklevel=2)

    def __getstate__(self) -> dict[str, Any]:
        return {"bound": self.bound, "over": self.over}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def _start(self) -> None:
        self._last = None
        self._streaks: weakref.WeakKeyDictionary[BucketMemory, int] = weakref.WeakKeyDictionary()
        self._told = False


def norm_of(values: Tensor) -> Tensor:
    """Returns the L2 norm, float32 without dimensions; 0 where it is not finite.

    A bucket with NaN or Inf is thrown away, and the step's others must still be clipped.
    """
    norm: Tensor = torch.linalg.vector_norm(values, dtype=torch.float32)
    return norm.nan_to_num(0.0, 0.0, 0.0)
