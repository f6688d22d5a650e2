"""Selectors: which k places of a corrected gradient are sent."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from ..native import ops
from ..native.fused import Fused, Selected
from .density import DensitySchedule, as_schedule


class Selector(ABC):
    """Takes k places out of the corrected gradient, in the same pass over memory that corrects it.

    Attributes:
        shared_mask: whether every rank selects the same indices, so that they need not travel.
    """

    shared_mask: ClassVar[bool] = False

    def __init__(self, density: float | DensitySchedule) -> None:
        self.schedule = as_schedule(density)

    def k(self, numel: int, step: int) -> int:
        """``max(1, ceil(density * numel))`` at ``step``; 0 for an empty bucket."""
        wanted = math.ceil(round(self.schedule.density(step) * numel, 6))
        return min(numel, max(1, wanted))

    @abstractmethod
    def select(self, operands: Fused, k: int, *, step: int, mask_key: int) -> Selected:
        """Updates the memory in ``operands`` and takes ``k`` pairs out of its residual.

        Args:
            operands: gradient and memory of one bucket; ``residual`` and ``velocity`` are overwritten.
            k: pairs wanted.
            step: exchanges so far, the same on all ranks.
            mask_key: the bucket's number or the hash of a name, which differs between the buckets of a step
                and is the same on all ranks.

        Returns:
            values ``(k,)`` float32, indices ``(k,)`` int32 ascending, and the report (count, non-finite,
            misses).
        """

    def settings(self) -> dict[str, object]:
        """What all ranks must share, by argument."""
        return {"density": self.schedule}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in self.settings().items())})"


class TopK(Selector):
    """The k largest magnitudes, exactly; ties go to the lower index.

    Args:
        density: k/n in (0, 1], or a schedule such as ``ExponentialWarmup``.
    """

    def select(self, operands: Fused, k: int, *, step: int, mask_key: int) -> Selected:
        return ops.select_topk(operands, k, seed=_sampling_seed(step, mask_key))


class ThresholdTopK(Selector):
    """About the k largest magnitudes: all that reach a threshold estimated from a sample, at most k of them.

    When more than k magnitudes reach the threshold, because many are equal, say, the first k from a starting
    place on are taken. The place changes with the step, so that no element is passed over for ever. The rest
    stays in the residual.
    """

    def select(self, operands: Fused, k: int, *, step: int, mask_key: int) -> Selected:
        seed = _sampling_seed(step, mask_key)
        # The estimate is a magnitude of the sample. It must pass itself: the largest magnitude may be alone.
        threshold = _next_below(ops.sample_threshold(operands, k, seed=seed))
        start = (seed * 2_654_435_761) % max(1, operands.grad.numel())
        return ops.select_threshold(operands, threshold, k, start=start)


class RandomK(Selector):
    """k places at random, the same on every rank, without replacement.

    The mask comes from a counter-based generator of our own, keyed by (seed, step, mask_key). Torch's
    generators are not touched. M-DSGD's convergence theory covers it as it covers top-k.

    Args:
        density: k/n in (0, 1], or a schedule.
        seed: non-negative integer, the same on all ranks.
    """

    shared_mask = True

    def __init__(self, density: float | DensitySchedule, seed: int = 0) -> None:
        super().__init__(density)
        if not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ValueError(f"seed must be an integer in [0, 2**63), got {seed!r}")
        self.seed = seed

    def select(self, operands: Fused, k: int, *, step: int, mask_key: int) -> Selected:
        grad = operands.grad
        indices = ops.random_indices(self.seed, step, mask_key, grad.numel(), k, grad.device)
        return ops.select_indices(operands, indices)

    def settings(self) -> dict[str, object]:
        return {**super().settings(), "seed": self.seed}


def _next_below(magnitude: float) -> float:
    """The next smaller float32, at least 0."""
    value, zero = torch.tensor([magnitude, 0.0], dtype=torch.float32, device="cpu")
    return float(torch.nextafter(value, zero))


def _sampling_seed(step: int, mask_key: int) -> int:
    return (step * 1_000_003 + mask_key) & 0x7FFF_FFFF_FFFF_FFFF
