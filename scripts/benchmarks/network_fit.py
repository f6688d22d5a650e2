"""Fits the cost model to bare exchanges at P = 2..8 and draws what it says up to P = 1024.

    python scripts/benchmarks/network_fit.py --json docs/performance/network-fit.json --plot docs/performance/network-scaling.png

Run as root from the checkout. Costs are fitted for each transport, on both networks together (bandwidth is known: it is
what tc was told), by non-negative least squares over relative errors, so that short exchanges count as much as long ones.
Every rank shares the cores of the machine that measured: CPU work counts with `crowding = P / cores` where P is larger; the
file holds `cores`. In the extrapolation every rank has a core of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from benchmarks import network_exchange
from benchmarks.namespaces import NETWORKS, Network, why_not
from benchmarks.network import run_job
from benchmarks.network_limits import LimitError, verify

from commhooks.planner.cost_model import Costs, exchange_s, exchange_terms, periodic_averaging_s

PAIRS = (1_000, 6_000, 25_558, 100_000)
_FITTED = ("message_s", "ring_step_s", "reduce_s", "merge_s")
_WIRE = 1.007  # Ethernet, IP and TCP headers at MTU 9000


def measure(ranks: Sequence[int], networks: Sequence[str], pairs: Sequence[int]) -> list[dict[str, Any]]:
    """Median seconds of every bare exchange; networks whose limit does not hold are told and left out."""
    rows = []
    for size in ranks:
        with Network(size, NETWORKS[networks[0]]) as network:
            for name in networks:
                network.set_rate(NETWORKS[name], 10_000 if name == "100mbit" else None)
                try:
                    verify(network)
                except LimitError as failure:
                    print(f"failed: {size} hosts, {name}: {failure}", file=sys.stderr)
                    continue
                found, error = run_job(
                    network, "network_exchange.py", network_exchange.cases(size, pairs), 400
                )
                if error is not None:
                    print(f"failed: {error}", file=sys.stderr)
                rows += [c | {"network": name, "seconds": median(c["seconds"])} for c in found]
                print(f"{size} ranks, {name}: {len(found)} exchanges", flush=True)
    return rows


def fit(rows: Sequence[dict[str, Any]], cores: int) -> Costs:
    """Costs of one transport's rows, measured on `cores` cores; wire time is given, the rest fitted."""
    import numpy
    from scipy.optimize import nnls

    matrix, target = [], []
    for row in rows:
        terms, wire = _split(row, cores)
        matrix.append([terms.get(name, 0.0) / row["seconds"] for name in _FITTED])
        target.append((row["seconds"] - wire) / row["seconds"])
    solution, _ = nnls(numpy.array(matrix), numpy.array(target))
    fitted = dict(zip(_FITTED, map(float, solution), strict=True))
    return Costs(**fitted, byte_s=8e-9, select_s=0.0, gather_s=0.0, write_s=0.0, bucket_s=0.0)


def predict(costs: Costs, row: dict[str, Any], cores: int) -> float:
    """Seconds by the model for a measured row."""
    terms, wire = _split(row, cores)
    return wire + costs.total(terms)


def _split(row: dict[str, Any], cores: int) -> tuple[dict[str, float], float]:
    scheme, crowding = row["scheme"].removesuffix("-mpi"), max(1.0, row["ranks"] / cores)
    terms = exchange_terms(scheme, 0, row["k"], row["ranks"], crowding)
    # Starting a message is CPU work too, where ranks wait for a core.
    for name in ("message_s", "ring_step_s"):
        if name in terms:
            terms[name] *= crowding
    wire = terms.pop("byte_s") * _WIRE * 8e-6 / NETWORKS[row["network"]]
    return terms, wire


def report(rows: list[dict[str, Any]], cores: int) -> dict[str, Any]:
    """Fits per transport and prediction errors, row by row."""
    result: dict[str, Any] = {"costs": {}, "rows": []}
    for transport, suffix in (("gloo", False), ("mpi", True)):
        own = [r for r in rows if r["scheme"].endswith("-mpi") == suffix]
        if not own:
            continue
        costs = fit(own, cores)
        result["costs"][transport] = {name: getattr(costs, name) for name in _FITTED}
        errors = []
        for row in own:
            predicted = predict(costs, row, cores)
            error = predicted / row["seconds"] - 1
            errors.append(abs(error))
            kept = {k: row[k] for k in ("scheme", "k", "ranks", "network", "seconds")}
            result["rows"].append(kept | {"predicted": predicted, "error": error})
        within = sum(e <= 0.25 for e in errors) / len(errors)
        result.setdefault("within_25_percent", {})[transport] = within
        print(f"{transport}: {costs}\n  within 25 %: {within:.0%} of {len(errors)}, worst {max(errors):.0%}")
    return result


def plot(costs: Costs, path: Path, numel: int = 25_557_032, density: float = 0.001) -> None:
    """Exchange time against P at two bandwidths, and against bandwidth at two P."""
    import matplotlib

    matplotlib.use("Agg")
    from dataclasses import replace

    from matplotlib import pyplot

    k = round(density * numel)
    lines = {
        "dense ring": lambda c, p: exchange_s(c, "dense", numel, 0, p),
        "M-AVG, K = 8": lambda c, p: periodic_averaging_s(c, numel, p, 8),
        "top-k, all-gather": lambda c, p: exchange_s(c, "topk", numel, k, p),
        "gTop-k, tree": lambda c, p: exchange_s(c, "gtopk-tree", numel, k, p),
        "gTop-k, doubling": lambda c, p: exchange_s(c, "gtopk", numel, k, p),
        "random-k, shared indices": lambda c, p: exchange_s(c, "randomk", numel, k, p),
    }
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), sharey=True)
    ranks = [2**i for i in range(1, 11)]
    rates = [10.0 * 10 ** (i / 4) for i in range(17)]
    for name, cost in lines.items():
        for axis, rate in zip(axes[0], (100.0, 10_000.0), strict=True):
            axis.plot(
                ranks, [cost(replace(costs, byte_s=8e-6 / rate), p) for p in ranks], marker=".", label=name
            )
            axis.set_title(f"{rate:g} Mbit/s")
            axis.set_xlabel("ranks P")
        for axis, size in zip(axes[1], (8, 1024), strict=True):
            axis.plot(rates, [cost(replace(costs, byte_s=8e-6 / rate), size) for rate in rates], label=name)
            axis.set_title(f"P = {size}")
            axis.set_xlabel("Mbit/s")
    for axis in axes.flat:
        axis.set_xscale("log", base=2 if axis in axes[0] else 10)
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("communication per step, s")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(
        f"Cost model, {numel / 1e6:.2f}M parameters, density {density:g}: exchange without selection"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    """Measures (or reads), fits, writes and draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--reuse", action="store_true", help="fit what FILE of --json holds, measure nothing")
    parser.add_argument("--ranks", type=int, nargs="+", default=list(range(2, 9)))
    parser.add_argument("--networks", nargs="+", default=["1gbit", "100mbit"], choices=NETWORKS)
    parser.add_argument("--pairs", type=int, nargs="+", default=list(PAIRS))
    options = parser.parse_args()
    if options.reuse:
        found = json.loads(options.json.read_text())
        rows, machine = found["rows"], {name: found[name] for name in ("cores", "load")}
    else:
        reason = why_not()
        if reason is not None:
            print(reason, file=sys.stderr)
            return 2
        rows = measure(options.ranks, options.networks, options.pairs)
        if not rows:
            return 1
        machine = {"cores": os.cpu_count() or 1, "load": os.getloadavg()[0]}
    result = report(rows, machine["cores"]) | machine
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.plot:
        which = result["costs"].get("gloo") or next(iter(result["costs"].values()))
        rest = {"byte_s": 8e-9, "select_s": 0.0, "gather_s": 0.0, "write_s": 0.0, "bucket_s": 0.0}
        plot(Costs(**which, **rest), options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
