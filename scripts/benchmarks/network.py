"""`scripts/bench network`: DDP steps and bare exchanges across a network with a real limit, ours beside torch's own.

    scripts/bench network --quick                          # 4 ranks, one model, few steps: five minutes
    scripts/bench network --json FILE --plot FILE.png      # everything: an hour and a half

What is measured: `network_rank.py`; how the network is made: `namespaces.py`; the stand-in models: `network_models.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import network_exchange
from benchmarks.namespaces import NETWORKS, Network, NetworkUnavailable, why_not
from benchmarks.network_launch import JobError, run_ranks
from benchmarks.network_limits import LimitError, verify
from benchmarks.network_models import MODELS
from benchmarks.network_rank import Case
from benchmarks.network_records import Record, plot, records_of, table
from benchmarks.network_schemes import AUTO, PLAIN, SCHEMES, is_ours

Failure = JobError | LimitError
"""What ends one measurement but not the run."""

_HERE = Path(__file__).parent
_QUICK = (
    "none",
    "dense",
    "fp16",
    "powersgd1",
    "topk",
    "gtopk",
    "gtopk-tree",
    "randomk",
    "topk-mpi",
    "gtopk-mpi",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `scripts/bench network`."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the step times there")
    parser.add_argument("--quick", action="store_true", help="4 ranks, ResNet-50's parameters, 7 steps")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["1gbit", "100mbit"])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--schemes", nargs="+", choices=(*SCHEMES, PLAIN), default=list(SCHEMES), metavar="NAME"
    )
    parser.add_argument("--density", type=float, default=0.001)
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each case")
    parser.add_argument(
        "--budget",
        type=float,
        default=60.0,
        metavar="S",
        help="no new timed step of a case after this (3 at least)",
    )
    parser.add_argument(
        "--bucket-mb",
        type=float,
        default=100.0,
        help="DDP's bucket_cap_mb for schemes of ours (auto: what it chose; torch's: its default)",
    )
    parser.add_argument("--no-exchange", action="store_true", help="leave out the bare exchanges")


def run(options: argparse.Namespace) -> int:
    """Measures, prints and writes; returns the exit status (2: this machine cannot)."""
    reason = why_not()
    if reason is not None:
        print(f"scripts/bench network: {reason}", file=sys.stderr)
        return 2
    if options.quick:
        options.ranks, options.models, options.schemes = [4], ["resnet50"], list(_QUICK)
        options.steps, options.budget = min(options.steps, 7), min(options.budget, 15.0)
    records: list[Record] = []
    failed = 0
    try:
        for found in _measure(options):
            if isinstance(found, Failure):
                failed += 1
                print(f"failed: {found}", file=sys.stderr)
                continue
            records += found
            if options.json:  # as it goes: a long run that is interrupted has not been for nothing
                options.json.write_text(json.dumps(records, indent=1) + "\n")
            print(table(found) or network_exchange.table(found), flush=True)
    except NetworkUnavailable as error:
        print(f"scripts/bench network: {error}", file=sys.stderr)
        return 2
    finally:  # also when it ends early
        if options.plot:
            plot(records, options.plot)
    return 1 if failed else 0


def _measure(options: argparse.Namespace) -> Iterator[list[Record] | Failure]:
    for ranks in options.ranks:
        with Network(ranks, NETWORKS[options.networks[0]]) as network:
            for name in options.networks:
                network.set_rate(NETWORKS[name])
                try:
                    rates = [t.mbit_per_s for t in verify(network)]
                except LimitError as error:
                    yield LimitError(f"{ranks} hosts, {name}: {error}")
                    continue
                print(
                    f"{ranks} hosts, {name}: {min(rates):.0f} to {max(rates):.0f} Mbit/s measured", flush=True
                )
                if not options.no_exchange:
                    yield _exchanges(network, name)
                for model in options.models:
                    yield from _steps(network, name, model, options)


def _steps(
    network: Network, name: str, model: str, options: argparse.Namespace
) -> Iterator[list[Record] | Failure]:
    """One job for a model, all schemes after one another, so that ratios are within one run."""
    buckets = {s: options.bucket_mb if is_ours(s) and s != AUTO else None for s in options.schemes}
    cases = [
        Case(s, model, options.density, options.steps, options.budget, buckets[s]) for s in options.schemes
    ]
    limit = 120.0 + len(cases) * (3 * options.budget + 20)
    found, error = run_job(network, "network_rank.py", [asdict(c) for c in cases], limit)
    if error is not None:
        yield error
    for case in found:
        if case["plan"]:
            print(f"{model}, {network.hosts} ranks, {name}: {plan_text(case['plan'])}", flush=True)
    if found:
        yield records_of(found, network.hosts, name)


def plan_text(plan: dict[str, Any]) -> str:
    """What `auto` decided, in a line."""
    chosen = f"{plan['scheme']} at density {plan['density']:g}, bucket_cap_mb={plan['bucket_mb']:g}"
    return f"auto chose {chosen}: {plan['reason']}"


def _exchanges(network: Network, name: str) -> list[Record] | JobError:
    """With the smallest bucket that tc takes, so that it gives nothing away."""
    network.set_rate(network.rate_mbit, 10_000 if network.rate_mbit == 100 else None)
    found, error = run_job(network, "network_exchange.py", network_exchange.cases(network.hosts), 120)
    network.set_rate(network.rate_mbit)
    return error or network_exchange.records_of(found, network.hosts, name)


def run_job(
    network: Network, program: str, cases: Sequence[dict[str, Any]], timeout_s: float
) -> tuple[list[dict[str, Any]], JobError | None]:
    """Runs a rank program on a list of cases; returns what came before it failed, if it did."""
    with tempfile.TemporaryDirectory(prefix="commhooks-bench-") as folder:
        job, out = Path(folder) / "job.json", Path(folder) / "out.jsonl"
        job.write_text(json.dumps(list(cases)))
        error = None
        try:
            run_ranks(network, [str(_HERE / program), str(job), str(out)], timeout_s=timeout_s)
        except JobError as caught:
            error = caught
        lines = out.read_text().splitlines() if out.exists() else []
    return [json.loads(line) for line in lines], error


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of its own: `python -m benchmarks.network`."""
    parser = argparse.ArgumentParser(prog="scripts/bench network", description=__doc__.splitlines()[0])
    add_arguments(parser)
    return run(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
