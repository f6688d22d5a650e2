"""Chooses scheme, density and bucket size from costs, or dense. Pure Python, no torch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .cost_model import LOW_BIT, Costs, check_backward_s, exposed_s, periodic_averaging_s, step_s

SPARSE = ("topk", "gtopk", "randomk")
"""The schemes with a density that are predicted for every job."""
CODED = ("lowbit8", "lowbit4", "lowbit2")
"""The schemes that send every element in few bits and are predicted for every job."""
CANDIDATES = (*SPARSE, *CODED)
SAFE = ("topk", "gtopk")
"""The schemes that may be chosen for SGD, and by default. Not random-k: it diverges with momentum."""
ADAPTIVE = ("lowbit8", "lowbit4")
"""The schemes that may be chosen for AdamW, Muon and other optimizers than SGD.

Sparse gradients cost them much of the loss. What 2 bits cost is not measured.
"""
DENSITIES = (0.01,)
"""The densities that are chosen by default. Lower ones need a density warm-up, which a plan cannot see."""
PREDICTED_DENSITIES = (0.01, 0.001)
BUCKET_MB = (1.0, 5.0, 25.0, 100.0, 400.0)
DEFAULT_BUCKET_MB = 25.0  # DDP's own
MARGIN = 1.5  # a candidate that sends less must be predicted to be this many times faster,
LEAST_SAVING_S = 2e-3  # and to save this much per step
AVERAGING_PERIOD = 4  # of the averager with a wire of one bit that is advised
EQUAL = 1.25  # two bucket sizes whose times differ by less than this factor count as equally fast
STEADY = 1.5
"""Up to this spread the measurements of a plan agree. Beyond it ``plan`` says that something else is busy."""
_BYTES_PER_MB = 1 << 20


@dataclass(frozen=True)
class Job:
    """The job that a plan is made for, and what the plan may choose.

    Attributes:
        numel: elements of all parameters.
        largest_numel: elements of the largest parameter, which DDP never splits. 0: unknown.
        backward_s: seconds of one backward, which hides the communication of all but the last buckets. 0:
            unknown.
        densities: values of k/n to choose from.
        schemes: schemes to choose from, beside dense.
        bucket_mb: values of ``bucket_cap_mb`` to choose from.

    Raises:
        ValueError: a number out of range, or an unknown scheme.
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

    def candidates(self) -> list[tuple[str, float]]:
        """Returns the allowed pairs of scheme and density, those closest to dense training first."""
        densities = sorted(self.densities, reverse=True)
        coded = [(s, 1.0) for s in CODED if s in self.schemes]
        exact = [(s, d) for d in densities for s in ("topk", "gtopk") if s in self.schemes]
        return coded + exact + [("randomk", d) for d in densities if "randomk" in self.schemes]

    def ladder(self) -> list[tuple[str, float]]:
        """Returns :meth:`candidates`, under its old name."""
        warnings.warn("Job.ladder is now called candidates", DeprecationWarning, stacklevel=2)
        return self.candidates()


@dataclass(frozen=True)
class Prediction:
    """One candidate, and the seconds that its communication adds to a step (``step_s``)."""

    scheme: str
    density: float
    bucket_mb: float
    step_s: float


@dataclass(frozen=True)
class Plan:
    """The choice for one job, and its reason. ``scheme`` is ``"dense"`` when compression would not pay.

    It can be called as the rule for a Reducer's ``dense_crossover``.

    Attributes:
        scheme: ``"gtopk"``, ``"topk"``, ``"randomk"``, ``"lowbit8"``, ``"lowbit4"`` or ``"dense"``.
        density: k / n (1.0 for dense and low-bit).
        bucket_mb: the value for DDP's ``bucket_cap_mb``.
        predictions: every candidate at its best bucket size, dense among them, fastest first.
        reason: why, in one sentence.
        costs: the measured costs.
        world_size: the number of ranks.
        job: the job.
        spread: the slowest of several measurements over the fastest, by what each predicts for dense.
    """

    scheme: str
    density: float
    bucket_mb: float
    predictions: tuple[Prediction, ...]
    reason: str
    costs: Costs
    world_size: int
    job: Job
    spread: float = 1.0

    def __call__(self, numel: int, k: int, world_size: int) -> bool:
        """Whether a bucket is predicted to be faster dense than by the scheme.

        The prediction for dense includes the pass that adds the gradient to the memory, which plain DDP does
        not have.
        """
        if self.scheme == "dense" or world_size == 1:
            return True
        dense = step_s(self.costs, "dense", numel, 0, world_size) + numel * self.costs.gather_s
        return dense <= step_s(self.costs, self.scheme, numel, k, world_size)

    @property
    def bits(self) -> int | None:
        """The bits of an element on the wire, or None if the scheme is not one of few bits."""
        return LOW_BIT.get(self.scheme)

    @property
    def averaging_s(self) -> float:
        """Seconds a step of an averager that sends one bit an element of the change every 4 steps.

        A plan does not choose it, since it is another way to train.
        """
        n, period = self.job.numel, AVERAGING_PERIOD
        return periodic_averaging_s(self.costs, n, self.world_size, period, scheme="lowbit1")

    def summary(self) -> str:
        """Returns scheme, density and bucket size in a few words."""
        if self.scheme == "dense":
            return f"dense all-reduce, bucket_cap_mb={self.bucket_mb:g}"
        if self.bits is not None:
            return f"lowbit, {self.bits} bits an element, bucket_cap_mb={self.bucket_mb:g}"
        return f"{self.scheme} at density {self.density:g}, bucket_cap_mb={self.bucket_mb:g}"

    def table(self) -> str:
        """Returns the measured costs and every candidate's prediction as text for a terminal."""
        lines = [
            self.costs.summary(),
            "",
            f"{'scheme':<10}{'density':>9}{'bucket MB':>11}{'added to a step':>17}",
        ]
        for p in self.predictions:
            lines.append(f"{p.scheme:<10}{p.density:>9g}{p.bucket_mb:>11g}{p.step_s * 1e3:>14.3g} ms")
        return "\n".join(lines)

    def faster_if_allowed(self) -> Prediction | None:
        """Returns the fastest candidate that the job does not allow, if it beats the choice by the margin."""
        allowed = [("dense", 1.0), *self.job.candidates()]
        taken = next(p for p in self.predictions if (p.scheme, p.density) == (self.scheme, self.density))
        others = (p for p in self.predictions if (p.scheme, p.density) not in allowed)
        return next((p for p in others if self.world_size > 1 and _pays(p, taken)), None)

    def __str__(self) -> str:
        ranks = "1 rank" if self.world_size == 1 else f"{self.world_size} ranks"
        return f"{self.job.numel:,} parameters on {ranks}: {self.summary()}: {self.reason}"

    def __repr__(self) -> str:
        c = self.costs
        return (
            f"Plan({self.scheme}, density={self.density:g}, P={self.world_size}, alpha={c.message_s!r}, "
            f"beta={c.byte_s!r})"
        )


def choose(costs: Costs, job: Job, world_size: int) -> Plan:
    """Makes the plan from the costs of one measurement.

    The choice starts at dense and goes through :meth:`Job.candidates`. Later candidates learn worse. So a
    candidate replaces the choice only when it is predicted to be ``MARGIN`` times faster and to save
    ``LEAST_SAVING_S`` seconds. Random-k never replaces another scheme.

    Args:
        costs: from :func:`commhooks.planner.probe`, the same on all ranks.
        job: the job to plan for.
        world_size: P.
    """
    allowed, densities = job.candidates(), {*job.densities, *PREDICTED_DENSITIES}
    pairs = [*((s, d) for s in SPARSE for d in sorted(densities)), *((s, 1.0) for s in CODED)]
    others = [pair for pair in pairs if pair not in allowed]
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
            f"predicted {_ms(taken.step_s)} of communication per step, {dense.step_s / taken.step_s:.1f} "
            f"times less than dense ({_ms(dense.step_s)})"
        )
    ranked = tuple(sorted([dense, *found.values()], key=lambda p: p.step_s))
    return Plan(taken.scheme, taken.density, taken.bucket_mb, ranked, reason, costs, world_size, job)


def settle(plans: Sequence[Plan]) -> Plan:
    """Returns the plan closest to dense training, of several measurements', so that noise decides nothing.

    Its scheme must pay by the slowest of its predictions beside the fastest of dense's, and by a factor that
    is as many times larger as the measurements differ. Else the plan is dense.
    """
    candidates = [("dense", 1.0), *plans[0].job.candidates()]
    taken = min(plans, key=lambda p: candidates.index((p.scheme, p.density)))
    alike = [p for p in plans if (p.scheme, p.density) == (taken.scheme, taken.density)]
    bucket_mb = min((p.bucket_mb for p in alike), key=_size_order)
    taken = replace(next(p for p in alike if p.bucket_mb == bucket_mb), spread=_spread(plans))
    if taken.scheme != "dense" and not _is_sure(plans, taken):
        return _too_noisy(plans, taken)
    if len(alike) == len(plans):
        return taken
    others = ", ".join(sorted({p.summary() for p in plans if p not in alike}))
    what = "dense" if taken.scheme == "dense" else "the one closest to dense"
    reason = f"too close to call: {what}. {len(plans) - len(alike)} of {len(plans)} measurements say {others}"
    return replace(taken, reason=reason)


def _of(plans: Sequence[Plan], scheme: str, density: float) -> list[Prediction]:
    """Returns what several measurements' plans predict for one candidate, the fastest first."""
    found = (p for plan in plans for p in plan.predictions if (p.scheme, p.density) == (scheme, density))
    return sorted(found, key=lambda p: p.step_s)


def _is_sure(plans: Sequence[Plan], taken: Plan) -> bool:
    """Whether what was taken pays by the margin times the factor that measurements differ by."""
    dense, found = _of(plans, "dense", 1.0), _of(plans, taken.scheme, taken.density)
    differ = max(_factor(dense), _factor(found))
    slowest = found[-1]
    return _pays(slowest, dense[0]) and MARGIN * differ * slowest.step_s <= dense[0].step_s


def _too_noisy(plans: Sequence[Plan], taken: Plan) -> Plan:
    """Returns the dense plan for measurements that differ by more than what was taken promises."""
    dense, others = _of(plans, "dense", 1.0), _of(plans, taken.scheme, taken.density)
    ranges = [f"{_ms(found[0].step_s)} to {_ms(found[-1].step_s)}" for found in (dense, others)]
    reason = (
        f"too close to call: dense. By {len(plans)} measurements dense takes {ranges[0]} per step, "
        f"{taken.scheme} at density {taken.density:g} {ranges[1]}"
    )
    return replace(taken, scheme="dense", density=1.0, bucket_mb=dense[0].bucket_mb, reason=reason)


def _spread(plans: Sequence[Plan]) -> float:
    """Returns the slowest prediction for a dense step over the fastest, of several measurements' plans."""
    return _factor(_of(plans, "dense", 1.0))


def _factor(found: Sequence[Prediction]) -> float:
    """Returns the slowest prediction over the fastest, of predictions in this order."""
    least, most = found[0].step_s, found[-1].step_s
    return most / least if least > 0.0 else 1.0


def _best(costs: Costs, job: Job, world_size: int, scheme: str, density: float) -> Prediction:
    """Returns the prediction for a scheme and density at its best bucket size."""
    found = []
    for megabytes in job.bucket_mb:
        buckets, size = _sizes(job, megabytes)
        k = min(size, max(1, math.ceil(density * size)))
        cost = step_s(costs, scheme, size, k, world_size)
        found.append(Prediction(scheme, density, megabytes, exposed_s(cost, buckets, job.backward_s)))
    least = min(p.step_s for p in found)
    return min((p for p in found if p.step_s <= EQUAL * least), key=lambda p: _size_order(p.bucket_mb))


def _sizes(job: Job, megabytes: float) -> tuple[int, int]:
    """Returns ``(number of buckets, elements of each)`` for one ``bucket_cap_mb``."""
    per_bucket = max(int(megabytes * _BYTES_PER_MB) // 4, job.largest_numel, 1)
    buckets = math.ceil(job.numel / per_bucket)
    return buckets, math.ceil(job.numel / buckets)


def _size_order(bucket_mb: float) -> tuple[bool, float]:
    """Orders equally fast sizes: DDP's default first, then the smallest, which needs the least memory."""
    return bucket_mb != DEFAULT_BUCKET_MB, bucket_mb


def _pays(candidate: Prediction, taken: Prediction) -> bool:
    return MARGIN * candidate.step_s <= taken.step_s and taken.step_s - candidate.step_s >= LEAST_SAVING_S


def _reason_dense(world_size: int, dense: Prediction, fastest: Prediction | None) -> str:
    if world_size == 1:
        return "do not compress: there is one rank, so nothing is sent"
    if fastest is None:
        return f"do not compress: dense takes {_ms(dense.step_s)} per step and no scheme may be chosen"
    density = "" if fastest.scheme in LOW_BIT else f", density {fastest.density:g}"
    return (
        f"do not compress: dense takes {_ms(dense.step_s)} per step, the best compression ({fastest.scheme}"
        f"{density}) {_ms(fastest.step_s)}: less than {MARGIN:g} times or {_ms(LEAST_SAVING_S)} faster"
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
