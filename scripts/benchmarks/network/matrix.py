"""`scripts/bench network`: DDP steps and bare exchanges across a limited network, ours beside torch's own.

    scripts/bench network --quick                          # 4 ranks, one model, few steps: five minutes
    scripts/bench network --json FILE --plot FILE.png      # everything: an hour and a half

The measurements are `step.py` and `exchange.py`, the stand-in models `models.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..harness import study
from ..harness.namespaces import NETWORKS
from ..harness.records import Record
from . import exchange, step
from .models import MODELS
from .schemes import AUTO, PLAIN, SCHEMES, is_ours

_QUICK = (
    "none", "dense", "fp16", "powersgd1", "topk", "gtopk", "gtopk-tree", "randomk", "topk-mpi", "gtopk-mpi",
)  # fmt: skip
_LEAST_BURST_BYTES = 10_000  # that holds a frame: bare exchanges at 100 Mbit/s are given nothing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `scripts/bench network`."""
    study.add_arguments(parser, needs_file=False)
    add = parser.add_argument
    add("--quick", action="store_true", help="4 ranks, ResNet-50's parameters, 7 steps")
    add("--ranks", type=int, nargs="+", default=[4, 8])
    add("--networks", nargs="+", choices=NETWORKS, default=["1gbit", "100mbit"])
    add("--models", nargs="+", choices=MODELS, default=list(MODELS))
    add("--schemes", nargs="+", choices=(*SCHEMES, PLAIN), default=list(SCHEMES), metavar="NAME")
    add("--density", type=float, default=0.001)
    add("--steps", type=int, default=20, help="timed steps of each case")
    budget = "no new timed step of a case after this (3 at least)"
    add("--budget", type=float, default=60.0, metavar="S", help=budget)
    buckets = "DDP's bucket_cap_mb for schemes of ours (auto: what it chose; torch's: its default)"
    add("--bucket-mb", type=float, default=100.0, help=buckets)
    add("--no-exchange", action="store_true", help="leave out the bare exchanges")


def run(options: argparse.Namespace) -> int:
    """Measures, prints and writes; returns the exit status (2: this machine cannot)."""
    if options.quick:
        options.ranks, options.models, options.schemes = [4], ["resnet50"], list(_QUICK)
        options.steps, options.budget = min(options.steps, 7), min(options.budget, 15.0)
    return study.run(jobs(options), options, table, step.plot)


def jobs(options: argparse.Namespace) -> list[study.Job]:
    """For each number of ranks and network: the exchanges, then a job for each model."""
    found = []
    for ranks in options.ranks:
        for network in options.networks:
            if not options.no_exchange:
                burst_bytes = _LEAST_BURST_BYTES if network == "100mbit" else None
                found.append(study.Job("exchange", ranks, network, exchange.cases(), 120.0, burst_bytes))
            found += [_steps(ranks, network, model, options) for model in options.models]
    return found


def _steps(ranks: int, network: str, model: str, options: argparse.Namespace) -> study.Job:
    """All schemes after one another in one start of the ranks, so that ratios are within one run."""
    cases = [
        step.Case(
            scheme,
            model,
            options.density,
            options.steps,
            options.budget,
            options.bucket_mb if is_ours(scheme) and scheme != AUTO else None,
        ).as_json()
        for scheme in options.schemes
    ]
    limit_s = 120.0 + len(cases) * (3 * options.budget + 20)
    return study.Job("step", ranks, network, cases, limit_s)


def table(records: Sequence[Record]) -> str:
    """Of the records of one job."""
    return exchange.table(records) if records[0]["bench"] == "exchange" else step.table(records)
