"""From costs to a plan: which scheme, density and bucket size, or not to compress. Pure Python, no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .cost_model import Costs, check_backward_s, exposed_s, step_s

CANDIDATES = ("topk", "gtopk", "randomk")
"""What is predicted for every job, beside dense."""
SAFE = ("topk", "gtopk")
"""What may be taken without knowing the optimizer. Random-k diverges with momentum, wherever it acts."""
DENSITIES = (0.01,)
"""What may be taken unasked. Less learns worse without a density warm-up, of which a plan knows nothing."""
PREDICTED_DENSITIES = (0.01, 0.001)
BUCKET_MB = (1.0, 5.0, 25.0, 100.0, 400.0)
DEFAULT_BUCKET_MB = 25.0  # DDP's own
MARGIN = 1.5  # what sends less must be promised to be this much faster, and LEAST_SAVING_S
LEAST_SAVING_S = 2e-3
EQUAL = 1.25  # two bucket sizes whose times differ by less than this factor count as equally fast
_BYTES_PER_MB = 1 << 20


@dataclass(frozen=True)
class Job:
    """What is planned for.

    Attributes:
        numel: parameters in all.
        largest_numel: elements of the largest parameter, which DDP never splits; 0: unknown.
        backward_s: seconds of one backward, which hides communication of all but the last buckets; 0:
            unknown.
        densities: k/n that may be taken.
        schemes: schemes that may be taken beside dense.
        bucket_mb: values of ``bucket_cap_mb`` that may be taken.

    Raises:
        ValueError: a number out of range, or no scheme of that name.
    """

    numel: int
    largest_numel: int = 0
    backward_s: float = 0.0
    densities: tuple[float, ...] = DENSITIES
    schemes: tuple[str, ...] = SAFE
    bucket_mb: tuple[float, ...] = BUCKET_MB

    def __post_init__(self) -> None:
        if self.numel < 1:
            raise ValueError(f"numel must be positive, got {self.numel}")
        if not self.densities or not all(0.0 < d <= 1.0 for d in self.densities):
            raise ValueError(f"densities must be in (0, 1], got {self.densities!r}")
        if not self.bucket_mb or not all(0.0 < b < math.inf for b in self.bucket_mb):
            raise ValueError(f"bucket_mb must be positive, got {self.bucket_mb!r}")
        if not set(self.schemes) <= set(CANDIDATES):
            raise ValueError(f"schemes must be among {CANDIDATES}, got {self.schemes!r}")
        check_backward_s(self.backward_s)

    def ladder(self) -> list[tuple[str, float]]:
        """What may be taken, from what is closest to dense training to what is furthest from it."""
        densities = sorted(self.densities, reverse=True)
        exact = [(s, d) for d in densities for s in ("topk", "gtopk") if s in self.schemes]
        return exact + [("randomk", d) for d in densities if "randomk" in self.schemes]


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
        job: what it was made for.
    """

    scheme: str
    density: float
    bucket_mb: float
    predictions: tuple[Prediction, ...]
    reason: str
    costs: Costs
    world_size: int
    job: Job

    def __call__(self, numel: int, k: int, world_size: int) -> bool:
        """The rule for a Reducer's ``dense_crossover``: whether a bucket is faster dense than by the scheme.

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

    def table(self) -> str:
        """The measured costs and the prediction of every candidate, as lines for a terminal."""
        lines = [
            self.costs.summary(),
            "",
            f"{'scheme':<10}{'density':>9}{'bucket MB':>11}{'added to a step':>17}",
        ]
        for p in self.predictions:
            lines.append(f"{p.scheme:<10}{p.density:>9g}{p.bucket_mb:>11g}{p.step_s * 1e3:>14.3g} ms")
        return "\n".join(lines)

    def faster_if_allowed(self) -> Prediction | None:
        """The fastest candidate that the job does not allow, if it pays as a step down from what is taken."""
        allowed = [("dense", 1.0), *self.job.ladder()]
        taken = next(p for p in self.predictions if (p.scheme, p.density) == (self.scheme, self.density))
        others = (p for p in self.predictions if (p.scheme, p.density) not in allowed)
        return next((p for p in others if self.world_size > 1 and _pays(p, taken)), None)

    def __str__(self) -> str:
        ranks = "1 rank" if self.world_size == 1 else f"{self.world_size} ranks"
        return f"{self.job.numel:,} parameters on {ranks}: {self.summary()}: {self.reason}"

    def __repr__(self) -> str:
        c = self.costs
        return (
            f"Plan({self.scheme}, density={self.density:g}, P={self.world_size}, "
            f"alpha={c.message_s!r}, beta={c.byte_s!r})"
        )


def choose(costs: Costs, job: Job, world_size: int) -> Plan:
    """The plan that one measurement gives.

    The choice starts at dense and goes down :meth:`Job.ladder`. A step down must be promised to be ``MARGIN``
    times faster than what is taken so far, and to save ``LEAST_SAVING_S``: what sends less learns worse.
    Random-k is taken only from dense.

    Args:
        costs: from :func:`commhooks.planner.probe`, the same on all ranks.
        job: what is planned for.
        world_size: P.
    """
    allowed, densities = job.ladder(), {*job.densities, *PREDICTED_DENSITIES}
    others = [(s, d) for s in CANDIDATES for d in sorted(densities) if (s, d) not in allowed]
    found = {pair: _best(costs, job, world_size, *pair) for pair in [*allowed, *others]}
    taken = dense = _best(costs, job, world_size, "dense", 1.0)
    for scheme, density in allowed if world_size > 1 else []:
        if scheme == "randomk" and taken.scheme not in ("dense", "randomk"):
            continue
        if _pays(found[scheme, density], taken):
            taken = found[scheme, density]
    if taken is dense:
        best = min((found[pair] for pair in allowed), key=lambda p: p.step_s, default=None)
        reason = _reason_dense(world_size, dense, best)
    else:
        reason = (
            f"predicted {_ms(taken.step_s)} of communication per step, "
            f"{dense.step_s / taken.step_s:.1f} times less than dense ({_ms(dense.step_s)})"
        )
    ranked = tuple(sorted([dense, *found.values()], key=lambda p: p.step_s))
    return Plan(taken.scheme, taken.density, taken.bucket_mb, ranked, reason, costs, world_size, job)


def settle(plans: Sequence[Plan]) -> Plan:
    """Of several measurements' plans the one closest to dense training, so that noise decides nothing."""
    ladder = [("dense", 1.0), *plans[0].job.ladder()]
    taken = min(plans, key=lambda p: ladder.index((p.scheme, p.density)))
    alike = [p for p in plans if (p.scheme, p.density) == (taken.scheme, taken.density)]
    bucket_mb = min((p.bucket_mb for p in alike), key=_size_order)
    taken = next(p for p in alike if p.bucket_mb == bucket_mb)
    if len(alike) == len(plans):
        return taken
    others = ", ".join(sorted({p.summary() for p in plans if p not in alike}))
    what = "dense" if taken.scheme == "dense" else "the one closest to dense"
    reason = f"too close to call: {what}. {len(plans) - len(alike)} of {len(plans)} measurements say {others}"
    return replace(taken, reason=reason)


def _best(costs: Costs, job: Job, world_size: int, scheme: str, density: float) -> Prediction:
    """The prediction at the best bucket size."""
    found = []
    for megabytes in job.bucket_mb:
        buckets, size = _sizes(job, megabytes)
        k = min(size, max(1, math.ceil(density * size)))
        cost = step_s(costs, scheme, size, k, world_size)
        found.append(Prediction(scheme, density, megabytes, exposed_s(cost, buckets, job.backward_s)))
    least = min(p.step_s for p in found)
    return min((p for p in found if p.step_s <= EQUAL * least), key=lambda p: _size_order(p.bucket_mb))


def _sizes(job: Job, megabytes: float) -> tuple[int, int]:
    """``(buckets, elements of each)``."""
    per_bucket = max(int(megabytes * _BYTES_PER_MB) // 4, job.largest_numel, 1)
    buckets = math.ceil(job.numel / per_bucket)
    return buckets, math.ceil(job.numel / buckets)


def _size_order(bucket_mb: float) -> tuple[bool, float]:
    """Of equally fast sizes DDP's default comes first, then the smallest, which needs the least memory."""
    return bucket_mb != DEFAULT_BUCKET_MB, bucket_mb


def _pays(candidate: Prediction, taken: Prediction) -> bool:
    return MARGIN * candidate.step_s <= taken.step_s and taken.step_s - candidate.step_s >= LEAST_SAVING_S


def _reason_dense(world_size: int, dense: Prediction, fastest: Prediction | None) -> str:
    if world_size == 1:
        return "do not compress: there is one rank, so nothing is sent"
    if fastest is None:
        return f"do not compress: dense takes {_ms(dense.step_s)} per step and no scheme may be chosen"
    return (
        f"do not compress: dense takes {_ms(dense.step_s)} per step, the best compression ({fastest.scheme}, "
        f"density {fastest.density:g}) {_ms(fastest.step_s)}: less than {MARGIN:g} times or "
        f"{_ms(LEAST_SAVING_S)} faster"
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
