"""From costs to a plan: which scheme, density and bucket size, or not to compress. Pure Python, no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .cost_model import Costs, check_backward_s, exposed_s, step_s

CANDIDATES = ("gtopk", "topk", "randomk")
DENSITIES = (0.01, 0.001)
BUCKET_MB = (1.0, 5.0, 25.0, 100.0, 400.0)
DEFAULT_BUCKET_MB = 25.0  # DDP's own
MARGIN = 1.5  # compression must promise at least this, and as much time, to be worth what probing gets wrong
LEAST_SAVING_S = 2e-3
EQUAL = 1.05  # of two bucket sizes
NEAR = 1.1  # a denser gradient is taken when it costs no more than this
_BYTES_PER_MB = 1 << 20


@dataclass(frozen=True)
class Prediction:
    """One candidate: seconds of communication that are added to a step."""

    scheme: str
    density: float
    bucket_mb: float
    step_s: float


@dataclass(frozen=True)
class Plan:
    """What to do, and why. ``scheme`` is ``"dense"`` when compression would not pay.

    Attributes:
        scheme: ``"gtopk"``, ``"topk"``, ``"randomk"`` or ``"dense"``.
        density: k / n (1.0 for dense).
        bucket_mb: DDP's ``bucket_cap_mb``.
        predictions: the best bucket size of every candidate, fastest first; dense is among them.
        reason: one sentence.
        costs: what it was computed from.
        world_size: ranks.
    """

    scheme: str
    density: float
    bucket_mb: float
    predictions: tuple[Prediction, ...]
    reason: str
    costs: Costs
    world_size: int

    def __call__(self, numel: int, k: int, world_size: int) -> bool:
        """The rule for a Reducer's ``dense_crossover``: whether a bucket of ``numel`` elements is faster dense than by the plan's scheme with ``k`` pairs.

        A bucket that goes dense here is corrected by the memory all the same: a pass that plain DDP has not.
        """
        if self.scheme == "dense" or world_size == 1:
            return True
        dense = step_s(self.costs, "dense", numel, 0, world_size) + numel * self.costs.gather_s
        return dense <= step_s(self.costs, self.scheme, numel, k, world_size)

    def summary(self) -> str:
        """Scheme, density and bucket size in a few words."""
        if self.scheme == "dense":
            return f"dense all-reduce, bucket_cap_mb={self.bucket_mb:g}"
        return f"{self.scheme} at density {self.density:g}, bucket_cap_mb={self.bucket_mb:g}"

    def __repr__(self) -> str:
        c = self.costs
        return (
            f"Plan({self.scheme}, density={self.density:g}, P={self.world_size}, "
            f"alpha={c.message_s!r}, beta={c.byte_s!r})"
        )


def choose(
    costs: Costs,
    numel: int,
    world_size: int,
    *,
    backward_s: float = 0.0,
    densities: Sequence[float] = DENSITIES,
    candidates: Sequence[str] = CANDIDATES,
    largest_numel: int = 0,
    bucket_mb: Sequence[float] = BUCKET_MB,
) -> Plan:
    """The plan for a model of ``numel`` parameters.

    Args:
        costs: from :func:`commhooks.planner.probe`, the same on all ranks.
        numel: parameters in all.
        world_size: P.
        backward_s: time of one backward, which hides communication of all but the last buckets; 0 if unknown.
        densities: allowed ones. The highest within 10 % of the fastest is taken: a denser gradient learns better.
        candidates: allowed schemes besides dense. Random-k is only taken when no other pays: it is cheap, but at
            equal density it needs more steps to the same loss.
        largest_numel: elements of the largest parameter, which DDP never splits; 0: unknown.
        bucket_mb: values of ``bucket_cap_mb`` to choose from.

    Raises:
        ValueError: a number out of range.
    """
    check_request(numel, densities, backward_s)
    if not bucket_mb or not all(0.0 < b < math.inf for b in bucket_mb):
        raise ValueError(f"bucket_mb must be positive, got {bucket_mb!r}")

    def best(scheme: str, density: float) -> Prediction:
        found = []
        for megabytes in bucket_mb:
            buckets, size = _sizes(numel, megabytes, largest_numel)
            k = min(size, max(1, math.ceil(density * size)))
            cost = step_s(costs, scheme, size, k, world_size)
            found.append(Prediction(scheme, density, megabytes, exposed_s(cost, buckets, backward_s)))
        return _taken_size(found)

    dense = best("dense", 1.0)
    sparse = [best(scheme, density) for scheme in candidates for density in densities]
    ranked = tuple(sorted([dense, *sparse], key=lambda p: p.step_s))
    paying = [p for p in sparse if _pays(p, dense)]
    allowed = [p for p in paying if p.scheme != "randomk"] or paying
    if world_size == 1 or not allowed:
        reason = _reason_dense(world_size, dense, min(sparse, key=lambda p: p.step_s, default=None))
        return Plan("dense", 1.0, dense.bucket_mb, ranked, reason, costs, world_size)
    fastest = min(p.step_s for p in allowed)
    taken = max((p for p in allowed if p.step_s <= NEAR * fastest), key=lambda p: (p.density, -p.step_s))
    reason = f"predicted {_ms(taken.step_s)} of communication per step, {dense.step_s / taken.step_s:.1f} times less "
    reason += f"than dense ({_ms(dense.step_s)})"
    return Plan(taken.scheme, taken.density, taken.bucket_mb, ranked, reason, costs, world_size)


def check_request(numel: int, densities: Sequence[float], backward_s: float) -> None:
    """Raises ``ValueError`` for what no plan can be made for; to be asked before ranks probe for nothing."""
    if numel < 1:
        raise ValueError(f"numel must be positive, got {numel}")
    if not densities or not all(0.0 < d <= 1.0 for d in densities):
        raise ValueError(f"densities must be in (0, 1], got {densities!r}")
    check_backward_s(backward_s)


def _sizes(numel: int, megabytes: float, largest_numel: int) -> tuple[int, int]:
    """``(buckets, elements of each)``."""
    per_bucket = max(int(megabytes * _BYTES_PER_MB) // 4, largest_numel, 1)
    buckets = math.ceil(numel / per_bucket)
    return buckets, math.ceil(numel / buckets)


def _taken_size(found: Sequence[Prediction]) -> Prediction:
    """DDP's default if it is within 5 % of the fastest, else the smallest that is (it needs less memory)."""
    least = min(p.step_s for p in found)
    near = [p for p in found if p.step_s <= EQUAL * least]
    return min(near, key=lambda p: (p.bucket_mb != DEFAULT_BUCKET_MB, p.bucket_mb))


def _pays(candidate: Prediction, dense: Prediction) -> bool:
    saving = dense.step_s - candidate.step_s
    return MARGIN * candidate.step_s <= dense.step_s and saving >= LEAST_SAVING_S


def _reason_dense(world_size: int, dense: Prediction, fastest: Prediction | None) -> str:
    if world_size == 1:
        return "do not compress: there is one rank, so nothing is sent"
    if fastest is None:
        return f"do not compress: dense takes {_ms(dense.step_s)} per step and no scheme may be chosen"
    return (
        f"do not compress: dense takes {_ms(dense.step_s)} per step, the best compression ({fastest.scheme}, density "
        f"{fastest.density:g}) {_ms(fastest.step_s)}: less than {MARGIN:g} times or {_ms(LEAST_SAVING_S)} faster"
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
