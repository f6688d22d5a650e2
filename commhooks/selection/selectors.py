"""Selectors: which k elements of a corrected gradient are sent."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import says_what_to_write
from ..native import ops
from ..native.fused import Fused, Selected
from .density import DensitySchedule, as_schedule

Places = tuple[Tensor, Tensor] | None
"""Where values and indices are written, float32 and int32 of shape ``(k,)``; None: new tensors."""


class Selector(ABC):
    """Corrects a gradient and takes k of its elements out, in one pass over memory.

    The corrected gradient is the gradient plus residual and momentum
    (:class:`~commhooks.native.fused.Fused`).

    Attributes:
        shared_mask: whether every rank selects the same indices, so that the indices need not be sent.
    """

    shared_mask: ClassVar[bool] = False

    @says_what_to_write
    def __init__(self, density: float | DensitySchedule) -> None:
        self.schedule = as_schedule(density)

    def k(self, numel: int, step: int) -> int:
        """Number of pairs to send of ``numel`` elements: ``max(1, ceil(density * numel))``; 0 when empty.

        ``density`` is the schedule's at ``step``.
        """
        wanted = math.ceil(round(self.schedule.density(step) * numel, 6))
        return min(numel, max(1, wanted))

    @abstractmethod
    def select(self, operands: Fused, k: int, *, step: int, mask_key: int, out: Places = None) -> Selected:
        """Adds the gradient to the memory in ``operands`` and takes ``k`` pairs out of the residual.

        Args:
            operands: gradient and memory of one bucket. Residual and velocity are overwritten, or written to
                ``residual_out`` and ``velocity_out`` where these are given.
            k: number of places in the result; unused ones are padding.
            step: number of exchanges so far, the same on all ranks.
            mask_key: the bucket's number or the hash of a parameter's name: different for each bucket of a
                step, and the same on all ranks.
            out: where values and indices are written, float32 and int32 of shape ``(k,)``, such as the
                places of a message. None: new tensors.

        Returns:
            values ``(k,)`` float32, indices ``(k,)`` int32 ascending, the report, and the active segments.

        Raises:
            TypeError: a wrong dtype.
            ValueError: sizes, devices or layout.
        """

    def settings(self) -> dict[str, object]:
        """Constructor arguments by name. They must be the same on all ranks."""
        return {"density": self.schedule}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in self.settings().items())})"


class TopK(Selector):
    """The k largest magnitudes, exactly; ties go to the lower index.

    Args:
        density: k/n in (0, 1], or a schedule such as ``ExponentialWarmup``.
    """

    def select(self, operands: Fused, k: int, *, step: int, mask_key: int, out: Places = None) -> Selected:
        values, indices = out or (None, None)
        return ops.select_topk(
            operands, k, seed=_sampling_seed(step, mask_key), values=values, indices=indices
        )


class ThresholdTopK(Selector):
    """About the k largest magnitudes: at most k of those that reach a threshold estimated from a sample.

    More than k magnitudes may reach the threshold, for example when many are equal. Then the first k after a
    starting index are taken, and the rest stays in the residual. The starting index changes with the step, so
    that no element is skipped at every step.

    Args:
        density: k/n in (0, 1], or a schedule such as ``ExponentialWarmup``.
    """

    def select(self, operands: Fused, k: int, *, step: int, mask_key: int, out: Places = None) -> Selected:
        seed = _sampling_seed(step, mask_key)
        # The kernel takes magnitudes above the threshold. The estimate is itself the magnitude of an element,
        # possibly the only large one, and must be taken too.
        threshold = _next_below(ops.sample_threshold(operands, k, seed=seed))
        start = (seed * 2_654_435_761) % max(1, operands.grad.numel())
        values, indices = out or (None, None)
        return ops.select_threshold(operands, threshold, k, start=start, values=values, indices=indices)


class RandomK(Selector):
    """k random elements without replacement, the same on every rank.

    The indices come from a counter-based generator of our own, keyed by (seed, step, mask_key). Torch's
    generators are neither read nor advanced. M-DSGD's convergence theory covers random-k as well as top-k.

    Args:
        density: k/n in (0, 1], or a schedule.
        seed: integer in [0, 2**63), the same on all ranks.

    Raises:
        ValueError: a density or seed out of range.
    """

    shared_mask = True

    @says_what_to_write
    def __init__(self, density: float | DensitySchedule, seed: int = 0) -> None:
        super().__init__(density)
        if not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ValueError(f"seed must be an integer in [0, 2**63), got {seed!r}")
        self.seed = seed

    def select(self, operands: Fused, k: int, *, step: int, mask_key: int, out: Places = None) -> Selected:
        grad = operands.grad
        mask = ops.random_indices(self.seed, step, mask_key, grad.numel(), k, grad.device)
        values, indices = out or (None, None)
        return ops.select_indices(operands, mask, values=values, out=indices)

    def settings(self) -> dict[str, object]:
        return {**super().settings(), "seed": self.seed}


def _next_below(magnitude: float) -> float:
    """The next smaller float32, at least 0."""
    value, zero = torch.tensor([magnitude, 0.0], dtype=torch.float32, device="cpu")
    return float(torch.nextafter(value, zero))


def _sampling_seed(step: int, mask_key: int) -> int:
    """The seed of a sample of the gradient, another one for each bucket and step. Ranks need not share it."""
    return (step * 1_000_003 + mask_key) & 0x7FFF_FFFF_FFFF_FFFF
