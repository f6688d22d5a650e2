"""`scripts/bench auto`: `SparseState.auto` beside plain DDP where no link is limited.

Needs root. Hosts are on a bridge without limits (veth pairs: memory copies, as on loopback). Dense, auto and
plain take turns, so that all see the same machine; the figure is the median over all their steps. auto
decides anew in every turn and gets the buckets that it chose. `plain` is what auto gives for "do not
compress" (with DDP's own buckets, as dense), timed whether or not it was chosen. `plans` is what auto decided
in each turn and what it was promised.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from ..harness import study
from ..harness.records import Record, one, select
from . import step
from .models import MODELS, numel
from .schemes import AUTO, PLAIN

SCHEMES = ("dense", AUTO, PLAIN)
_STEPS, _BUDGET_S = 7, 20.0


def measure(case: dict[str, Any], rank: int, size: int) -> Iterator[Record]:
    """Yields a record for each scheme, see `records_of`."""
    turns: dict[str, list[step.Timed]] = {scheme: [] for scheme in SCHEMES}
    for _ in range(case["turns"]):
        for scheme, timed in turns.items():
            timed.append(
                step.time_steps(step.Case(scheme, case["model"], steps=_STEPS, budget_s=_BUDGET_S), rank)
            )
    yield from records_of(turns, case["model"])


def records_of(turns: Mapping[str, Sequence[step.Timed]], model: str) -> list[Record]:
    """`step_s`: the median over all steps of all turns; `plans`: auto's decisions, turn by turn."""
    found = []
    for scheme, timed in turns.items():
        seconds = [second for turn in timed for second in turn.seconds]
        record = {"scheme": scheme, "model": model, "numel": numel(MODELS[model]()), "turns": len(timed)}
        record |= {"step_s": median(seconds), "steps": len(seconds)}
        if scheme == AUTO:
            record["plans"] = [turn.plan for turn in timed]
        found.append(record)
    return found


def over_dense(record: Record, records: Sequence[Record]) -> float:
    """A step over dense's of the same turns."""
    dense = one(records, scheme="dense", model=record["model"], ranks=record["ranks"])
    return float(record["step_s"] / dense["step_s"])


def table(records: Sequence[Record]) -> str:
    """A line for each scheme, and auto's decisions."""
    lines = []
    for r in records:
        where = f"{r['model']}, {r['ranks']} ranks, {r['scheme']}"
        lines.append(f"{where}: {r['step_s'] * 1e3:.1f} ms, {over_dense(r, records):.2f} of dense")
    for r in select(records, scheme=AUTO):
        lines += [f"  {step.plan_text(plan)}" for plan in r["plans"]]
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `scripts/bench auto`."""
    study.add_arguments(parser, draws=False)
    parser.add_argument("--models", nargs="+", default=["resnet20", "resnet50"], choices=MODELS)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--turns", type=int, default=4)


def run(options: argparse.Namespace) -> int:
    """Measures, prints and writes records."""
    jobs = [
        study.Job("auto", ranks, study.UNLIMITED, [{"model": model, "turns": options.turns}], 500.0)
        for ranks in options.ranks
        for model in options.models
    ]
    return study.run(jobs, options, table)
