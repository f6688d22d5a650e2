"""A study: jobs on test networks one after the other, their records kept as they come.

A failure ends what it hits and not the study: a job whose ranks fail keeps the records before, and a network
whose limit does not hold loses its jobs only.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from . import records
from .launch import JobError, Loopback, run_job
from .limits import LimitError, verify
from .namespaces import NETWORKS, Network, NetworkUnavailable, why_not
from .records import Record

UNLIMITED = "unlimited"
"""Hosts on a bridge without limits: memory copies, as on loopback."""
LOOPBACK = "loopback"
"""No hosts: all ranks on this machine."""
Failure = JobError | LimitError
"""What ends one job, or one network, but not the study."""


@dataclass(frozen=True)
class Job:
    """One start of the ranks: what is compared with one another belongs into one job.

    Attributes:
        measurement: a module of `benchmarks.network`.
        ranks: how many.
        network: a name of `NETWORKS`, `UNLIMITED` or `LOOPBACK`.
        cases: what `measure` is called with, one after the other.
        timeout_s: for all cases.
        burst_bytes: of the token buckets during this job; None: the network's default.
    """

    measurement: str
    ranks: int
    network: str
    cases: Sequence[dict[str, Any]]
    timeout_s: float
    burst_bytes: int | None = None


def add_arguments(parser: argparse.ArgumentParser, *, needs_file: bool = True, draws: bool = True) -> None:
    """Adds `--json` and, where there is a picture, `--plot`: the same for every study."""
    text = "Write the records to FILE, one a line." + (" Required." if needs_file else " Default: no file.")
    parser.add_argument("--json", type=Path, metavar="FILE", required=needs_file, help=text)
    if draws:
        parser.add_argument(
            "--plot", type=Path, metavar="FILE", help="Draw the picture into FILE. Default: no picture."
        )


def run(
    jobs: Sequence[Job],
    options: argparse.Namespace,
    show: Callable[[list[Record]], str],
    draw: Callable[[list[Record], Path], None] | None = None,
) -> int:
    """Runs the jobs, prints `show` of each one's records, and draws all records when it ends.

    Returns:
        The exit status: 0; 1 when something failed; 2 when this machine cannot make such networks.
    """
    networks = any(job.network != LOOPBACK for job in jobs)
    reason = why_not() if networks else None
    if reason is not None:
        print(f"scripts/bench {options.command}: {reason}", file=sys.stderr)
        return 2
    kept = [_machine()]
    failed = 0
    try:
        for found in results(jobs):
            if isinstance(found, Failure):
                failed += 1
                print(f"failed: {found}", file=sys.stderr)
                continue
            kept += found
            if options.json:
                records.save(kept, options.json)
            shown = records.measured(found)
            print(show(shown) if shown else "\n".join(map(_link_text, found)), flush=True)
    except NetworkUnavailable as error:
        print(f"scripts/bench {options.command}: {error}", file=sys.stderr)
        return 2
    finally:
        drawn = records.measured(kept)
        if draw is not None and options.plot and drawn:
            draw(drawn, options.plot)
    return 1 if failed else 0


def results(jobs: Sequence[Job]) -> Iterator[list[Record] | Failure]:
    """The records of each job and the failures, as they come. Jobs of equally many ranks share a network."""
    for (ranks, on_hosts), group in groupby(jobs, key=lambda job: (job.ranks, job.network != LOOPBACK)):
        if not on_hosts:
            for job in group:
                yield from _result(job, Loopback(ranks))
            continue
        jobs_here = list(group)
        with Network(ranks, _rate(jobs_here[0].network)) as network:
            for name, same in groupby(jobs_here, key=lambda job: job.network):
                yield from _on_network(network, name, list(same))


def _on_network(network: Network, name: str, jobs: Sequence[Job]) -> Iterator[list[Record] | Failure]:
    network.set_rate(_rate(name))
    if name != UNLIMITED:
        try:
            rates = [transfer.mbit_per_s for transfer in verify(network)]
        except LimitError as error:
            yield LimitError(f"{network.hosts} hosts, {name}: {error}")
            return
        yield [{"bench": records.LINK, "ranks": network.hosts, "network": name, "mbit_per_s": rates}]
    for job in jobs:
        network.set_rate(_rate(name), job.burst_bytes)
        yield from _result(job, network)


def _result(job: Job, network: Network | Loopback) -> Iterator[list[Record] | Failure]:
    found, error = run_job(network, job.measurement, job.cases, job.timeout_s)
    if error is not None:
        yield error
    if found:
        labels = {"bench": job.measurement, "ranks": job.ranks, "network": job.network}
        yield [labels | record for record in found]


def _rate(name: str) -> float | None:
    return None if name == UNLIMITED else NETWORKS[name]


def _link_text(record: Record) -> str:
    rates = record["mbit_per_s"]
    return (
        f"{record['ranks']} hosts, {record['network']}: {min(rates):.0f} to {max(rates):.0f} Mbit/s measured"
    )


def _machine() -> Record:
    return {"bench": records.MACHINE, "cores": os.cpu_count() or 1, "load": os.getloadavg()[0]}
