"""`scripts/bench plan-check`: what the planner predicts beside what it takes, on loopback.

Turn by turn every rank probes and then times the steps it has just predicted, so that both see the same
machine. A step is all buckets of a bare gradient through a `SparseState`, without backward; its time is the
slowest rank's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from commhooks import SparseState
from commhooks.planner import probe, step_s
from commhooks.transports import make

from ..harness import study
from ..harness.ranks import largest, settle
from ..harness.records import Record

MODELS = {"small": (269_722, 1), "large": (19_660_800, 3)}
"""Name: parameters and equal buckets (25 MB each for the large one)."""
SCHEMES = (("dense", 1.0), ("topk", 0.01), ("topk", 0.001))
TRANSPORTS = ("distributed", "mpi")
_STEPS = {"small": 20, "large": 8}
_MEASURED = ("predicted_s", "least_s", "median_s", "probe_s")


def measure(case: dict[str, Any], rank: int, size: int) -> Iterator[Record]:
    """Yields a record for each scheme, see `summary`. `case`: transport, model, turns."""
    numel, buckets = MODELS[case["model"]]
    labels = {"transport": case["transport"], "model": case["model"], "numel": numel, "buckets": buckets}
    rows: list[dict[str, Any]] = [
        labels | {"scheme": scheme, "density": density} | {name: [] for name in _MEASURED}
        for scheme, density in SCHEMES
    ]
    for _ in range(case["turns"]):
        _turn(rows, size)
    yield from map(summary, rows)


def summary(row: dict[str, Any]) -> Record:
    """The record of a case's turns.

    `predicted_s` and `least_s` are the least over all turns: a quiet machine's, and the probe takes the least
    of its measurements too. `median_s` and `probe_s` are medians over turns. `least_ratio` and
    `largest_ratio` are predicted over least of single turns, which the record does not hold.
    """
    ratios = sorted(p / m for p, m in zip(row["predicted_s"], row["least_s"], strict=True))
    return {
        **{name: row[name] for name in ("transport", "model", "numel", "buckets", "scheme", "density")},
        "predicted_s": min(row["predicted_s"]),
        "least_s": min(row["least_s"]),
        "median_s": median(row["median_s"]),
        "probe_s": median(row["probe_s"]),
        "least_ratio": ratios[0],
        "largest_ratio": ratios[-1],
        "turns": len(ratios),
    }


def ratio(record: Record) -> float:
    """Predicted over measured."""
    return float(record["predicted_s"] / record["least_s"])


def line(record: Record) -> str:
    """A record as a line of a table."""
    what = f"{record['transport']:<12} {record['model']:<6} {record['scheme']:<6} {record['density']:<6g}"
    milliseconds = [record[name] * 1e3 for name in ("predicted_s", "least_s", "median_s")]
    times = "predicted {:8.2f} ms, least {:8.2f} ms, median {:8.2f} ms".format(*milliseconds)
    spread = f"{record['least_ratio']:.2f} to {record['largest_ratio']:.2f}"
    return f"{what} {times}, ratio {ratio(record):.2f} (single turns {spread})"


def table(records: Sequence[Record]) -> str:
    """A line for each case."""
    return "\n".join(map(line, records))


def _turn(rows: list[dict[str, Any]], world_size: int) -> None:
    """Probes once and times every row's steps; the figures are appended to the rows."""
    transport, buckets = rows[0]["transport"], rows[0]["buckets"]
    opened = make(transport)
    began = time.perf_counter()
    costs = probe(opened, rows[0]["numel"])
    probe_s = time.perf_counter() - began
    opened.close()
    for row in rows:
        numel = row["numel"] // buckets
        k = max(1, int(row["density"] * numel))
        times = _step_times(row, numel)
        predicted_s = buckets * step_s(costs, row["scheme"], numel, k, world_size)
        for name, value in zip(_MEASURED, (predicted_s, min(times), median(times), probe_s), strict=True):
            row[name].append(value)


def _step_times(row: dict[str, Any], numel: int) -> list[float]:
    """The slowest rank's seconds for all buckets, step by step.

    Raises:
        AssertionError: a bucket was not averaged.
    """
    if row["scheme"] == "dense":
        state = SparseState.dense(row["transport"])
    else:
        state = SparseState.topk(row["density"], row["transport"])
    buckets = row["buckets"]
    generator = torch.Generator().manual_seed(dist.get_rank())
    gradients = [torch.randn(numel, generator=generator) for _ in range(buckets)]
    parameters = [torch.zeros(numel, requires_grad=True) for _ in range(buckets)]
    times = []
    for _ in range(_STEPS[row["model"]] + 2):  # the first ones open connections and touch memory
        buffers = [g.clone() for g in gradients]
        for parameter in parameters:  # a state zeroes the bucket of a parameter that no backward pass reached
            parameter.grad = None
            parameter.sum().backward()
        settle()
        began = time.perf_counter()
        futures = [state.submit(b, i, (parameters[i],), i == buckets - 1) for i, b in enumerate(buffers)]
        for future in futures:
            future.wait()
        times.append(time.perf_counter() - began)
        if any(torch.equal(buffer, own) for buffer, own in zip(buffers, gradients, strict=True)):
            raise AssertionError("a bucket holds this rank's own gradient: it was not averaged")
    state.close()
    return largest(times[2:])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `scripts/bench plan-check`."""
    study.add_arguments(parser, needs_file=False, draws=False)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)


def run(options: argparse.Namespace) -> int:
    """Starts the ranks, prints a table and writes records."""
    cases = [
        {"transport": transport, "model": model, "turns": options.turns}
        for transport in TRANSPORTS
        for model in MODELS
    ]
    job = study.Job("plan_check", options.ranks, study.LOOPBACK, cases, 600.0)
    return study.run([job], options, table)
