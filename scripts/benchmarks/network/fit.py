"""`scripts/bench fit`: costs of the cost model from bare exchanges at P = 2..8, drawn up to P = 1024.

Needs root. Costs are fitted for each transport, on both networks together, by non-negative least squares over
relative errors, so that short exchanges count as much as long ones. Bandwidth is not fitted: it is what tc
was told. All ranks share the cores of the machine that measured, which the file names: CPU work counts with
`crowding = P / cores` where P is larger. In the extrapolation every rank has a core of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from commhooks.planner.cost_model import Costs, exchange_s, exchange_terms, periodic_averaging_s

from ..harness import records as files
from ..harness import study
from ..harness.figure import COLORS, WIDTH, color, figure, label_ends
from ..harness.namespaces import NETWORKS
from ..harness.records import Record, one, select
from . import exchange
from .schemes import MPI_SUFFIX

PAIRS = (1_000, 6_000, 25_558, 100_000)
FITTED = ("message_s", "ring_step_s", "reduce_s", "merge_s")
_GIVEN = {"byte_s": 8e-9, "select_s": 0.0, "gather_s": 0.0, "write_s": 0.0, "bucket_s": 0.0}
_WIRE = 1.007  # Ethernet, IP and TCP headers at MTU 9000
_NEAR = 0.25


def fit(rows: Sequence[Record], cores: int) -> Costs:
    """Costs of one transport's exchanges, measured on `cores` cores; wire time is given, the rest fitted."""
    import numpy
    from scipy.optimize import nnls

    matrix, target = [], []
    for row in rows:
        terms, wire_s = _split(row, cores)
        matrix.append([terms.get(name, 0.0) / row["exchange_s"] for name in FITTED])
        target.append((row["exchange_s"] - wire_s) / row["exchange_s"])
    solution, _ = nnls(numpy.array(matrix), numpy.array(target))
    return Costs(**dict(zip(FITTED, map(float, solution), strict=True)), **_GIVEN)


def predict(costs: Costs, row: Record, cores: int) -> float:
    """Seconds by the model for a measured exchange."""
    terms, wire_s = _split(row, cores)
    return wire_s + costs.total(terms)


def _split(row: Record, cores: int) -> tuple[dict[str, float], float]:
    """The factors of the costs without the wire's, and the wire's seconds."""
    scheme, crowding = row["scheme"].removesuffix(MPI_SUFFIX), max(1.0, row["ranks"] / cores)
    terms = exchange_terms(scheme, 0, row["pairs"], row["ranks"], crowding)
    # Starting a message is CPU work too, where ranks wait for a core.
    for name in ("message_s", "ring_step_s"):
        if name in terms:
            terms[name] *= crowding
    wire_s = terms.pop("byte_s") * _WIRE * 8e-6 / NETWORKS[row["network"]]
    return terms, wire_s


@dataclass(frozen=True)
class Fit:
    """The fit of one transport: costs, rows, and each row's relative error (0.1: predicted 10 % too long)."""

    costs: Costs
    rows: Sequence[Record]
    errors: Sequence[float]

    @property
    def within(self) -> int:
        """Rows that are predicted within 25 %."""
        return sum(abs(error) <= _NEAR for error in self.errors)

    @property
    def worst(self) -> float:
        """The largest error, either way."""
        return max(map(abs, self.errors))

    def only(self, **labels: object) -> Fit:
        """The same fit, looked at for the rows with these labels."""
        kept = [(r, e) for r, e in zip(self.rows, self.errors, strict=True) if select([r], **labels)]
        return Fit(self.costs, [r for r, _ in kept], [e for _, e in kept])


def fits(records: Sequence[Record]) -> dict[str, Fit]:
    """A fit for each transport, "gloo" and "mpi", that the records of a file hold."""
    cores = one(records, bench=files.MACHINE)["cores"]
    found = {}
    for transport, of_mpi in (("gloo", False), ("mpi", True)):
        rows = [r for r in select(records, bench="exchange") if r["scheme"].endswith(MPI_SUFFIX) == of_mpi]
        if rows:
            costs = fit(rows, cores)
            found[transport] = Fit(
                costs, rows, [predict(costs, r, cores) / r["exchange_s"] - 1 for r in rows]
            )
    return found


def report(records: Sequence[Record]) -> str:
    """Costs and how well they predict, a line or two for each transport."""
    lines = []
    for transport, found in fits(records).items():
        count = len(found.rows)
        lines.append(f"{transport}: {found.costs}")
        lines.append(f"  within 25 %: {found.within / count:.0%} of {count}, worst {found.worst:.0%}")
    return "\n".join(lines)


def plot(records: Sequence[Record], path: Path) -> None:
    """Exchange time by the model, with gloo's costs if they were fitted."""
    found = fits(records)
    plot_costs((found.get("gloo") or next(iter(found.values()))).costs, path)


def plot_costs(costs: Costs, path: Path, numel: int = exchange.NUMEL, density: float = 0.001) -> None:
    """Exchange time against P at two bandwidths, and against bandwidth at two P."""
    k = round(density * numel)
    named = {"top-k": "topk", "gTop-k, tree": "gtopk-tree", "gTop-k": "gtopk", "random-k": "randomk"}
    lines: dict[str, tuple[str, str, Callable[[Costs, int], float]]] = {
        "dense ring": (COLORS["dense"], "-", lambda c, p: exchange_s(c, "dense", numel, 0, p)),
        "M-AVG, K = 8": (COLORS["averaging"], "-", lambda c, p: periodic_averaging_s(c, numel, p, 8)),
    }
    for label, scheme in named.items():
        dashes = "--" if scheme.endswith("-tree") else "-"
        lines[label] = (color(scheme), dashes, partial(_sparse_s, scheme, numel, k))
    ranks = [2**i for i in range(1, 11)]
    rates = [10.0 * 10 ** (i / 4) for i in range(17)]
    with figure(path, 2, 2, figsize=(WIDTH, 7), sharey=True) as (drawn, axes):
        for axis, rate in zip(axes[0], (100.0, 10_000.0), strict=True):
            at_rate = replace(costs, byte_s=8e-6 / rate)
            _curves(axis, lines, ranks, lambda cost, p, at=at_rate: cost(at, p))
            axis.set(title=f"{rate:g} Mbit/s", xlabel="ranks P")
        for axis, size in zip(axes[1], (8, 1024), strict=True):
            _curves(axis, lines, rates, lambda cost, r, p=size: cost(replace(costs, byte_s=8e-6 / r), p))
            axis.set(title=f"P = {size} ranks", xlabel="bandwidth of a link, Mbit/s")
        for axis in axes.flat:
            axis.set_xscale("log", base=2 if axis in axes[0] else 10)
            axis.set_yscale("log")
        for axis in axes[:, 0]:
            axis.set_ylabel("communication of a step, s")
        drawn.suptitle(
            f"Cost model, not measured: exchange without selection, {numel / 1e6:.2f}M parameters, density {density:g}"
        )
        for axis in axes.flat:
            label_ends(axis, axis.get_lines())


def _curves(
    axis: Any, lines: dict[str, tuple[str, str, Any]], xs: list[Any], y: Callable[[Any, Any], float]
) -> None:
    for name, (shade, dashes, cost) in lines.items():
        axis.plot(xs, [y(cost, x) for x in xs], dashes, color=shade, label=name)


def _sparse_s(scheme: str, numel: int, k: int, costs: Costs, ranks: int) -> float:
    return exchange_s(costs, scheme, numel, k, ranks)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `scripts/bench fit`."""
    study.add_arguments(parser)
    add = parser.add_argument
    add("--reuse", action="store_true", help="fit what FILE of --json holds, measure nothing")
    add("--ranks", type=int, nargs="+", default=list(range(2, 9)))
    add("--networks", nargs="+", default=["1gbit", "100mbit"], choices=NETWORKS)
    add("--pairs", type=int, nargs="+", default=list(PAIRS))


def run(options: argparse.Namespace) -> int:
    """Measures (or reads), writes, fits and draws. Where a job failed, only `--reuse` fits."""
    if not options.reuse:
        status = study.run(jobs(options), options, told)
        if status:
            return status
    found = files.load(options.json)
    print(report(found))
    if options.plot:
        plot(found, options.plot)
    return 0


def jobs(options: argparse.Namespace) -> list[study.Job]:
    """One for each number of ranks and network."""
    return [
        study.Job(
            "exchange",
            ranks,
            network,
            exchange.cases(options.pairs),
            400.0,
            10_000 if network == "100mbit" else None,
        )
        for ranks in options.ranks
        for network in options.networks
    ]


def told(records: Sequence[Record]) -> str:
    """What one job brought, in a line."""
    return f"{records[0]['ranks']} ranks, {records[0]['network']}: {len(records)} exchanges"
