"""The exchange alone: a selection of ResNet-50's size at density 0.001 (25,558 pairs) through every aggregator.

Run on each rank as `network_exchange.py JOB.json OUT.jsonl`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.namespaces import NETWORKS

_NUMEL = 25_557_032
_ALGORITHMS = ("topk", "gtopk", "gtopk-tree", "randomk")
_REPEATS = 20


def cases(ranks: int, pairs: Sequence[int] = (25_558,)) -> list[dict[str, Any]]:
    """Every aggregator over both transports, for each number of pairs."""
    return [
        {"scheme": f"{name}{suffix}", "k": k, "ranks": ranks}
        for k in pairs
        for suffix in ("", "-mpi")
        for name in _ALGORITHMS
    ]


def main() -> None:
    """Times each case; rank 0 writes one JSON line for each."""
    job, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    from benchmarks.network_launch import join

    rank, _ = join()
    import torch.distributed as dist

    for case in job:
        figures = case | measure(case, rank)
        if rank == 0:
            with out.open("a") as file:
                file.write(json.dumps(figures) + "\n")
    dist.destroy_process_group()


def measure(case: dict[str, Any], rank: int) -> dict[str, Any]:
    """Seconds of the slowest rank, exchange by exchange, and what a rank sent at most."""
    import torch
    import torch.distributed as dist
    from benchmarks.network_launch import check_crossed, interface_bytes
    from benchmarks.network_schemes import make_state

    from commhooks.gradient.sparse_grad import SparseGrad
    from commhooks.wire.message import Context

    aggregator = make_state(case["scheme"], 0.001).reducer.aggregator
    transport = aggregator.open(timeout_s=60.0)
    pairs = _pairs(SparseGrad, case["k"], rank if "randomk" not in case["scheme"] else 0)
    seconds, counted = [], transport.counters.bytes_sent
    interface = interface_bytes()
    for step in range(_REPEATS + 2):
        dist.barrier()
        begun = time.perf_counter()
        aggregator.aggregate(pairs, False, Context(0, step))
        seconds.append(time.perf_counter() - begun)
    dist.barrier()
    table = torch.tensor(seconds[2:])
    dist.all_reduce(table, op=dist.ReduceOp.MAX)
    bytes_sent = [transport.counters.bytes_sent - counted, interface_bytes() - interface]
    check_crossed(*bytes_sent, case["scheme"])
    sent = torch.tensor(bytes_sent) / (_REPEATS + 2)
    dist.all_reduce(sent, op=dist.ReduceOp.MAX)
    aggregator.close()
    return {"seconds": table.tolist(), "counted_bytes": float(sent[0]), "interface_bytes": float(sent[1])}


def _pairs(make: Any, k: int, seed: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(_NUMEL, (2 * k + 64,), generator=generator).unique()
    places = places[torch.randperm(places.numel(), generator=generator)[:k]].sort().values
    return make(torch.randn(k, generator=generator), places.to(torch.int32), _NUMEL)


def records_of(found: Iterable[dict[str, Any]], ranks: int, network: str) -> list[dict[str, Any]]:
    """Records; `bound` is the bytes a rank sends at most over the bandwidth (rounds times bytes for gTop-k)."""
    found = list(found)
    medians = {(c["scheme"], c["k"]): median(c["seconds"]) for c in found}
    records = []
    for case in found:
        scheme, k = case["scheme"], case["k"]
        value = medians[scheme, k]
        rivals = {"bound": case["counted_bytes"] * 8e-6 / NETWORKS[network]}
        suffix = "-mpi" if scheme.endswith("-mpi") else ""
        rivals |= {
            b + suffix: medians[b + suffix, k] for b in ("topk", "gtopk-tree") if (b + suffix, k) in medians
        }
        for baseline, against in rivals.items():
            if baseline != scheme:
                records.append(
                    {
                        "bench": "exchange",
                        "scheme": scheme,
                        "model": f"{k} pairs",
                        "numel": _NUMEL,
                        "density": k / _NUMEL,
                        "ranks": ranks,
                        "network": network,
                        "metric": "exchange",
                        "unit": "s",
                        "value": value,
                        "baseline": baseline,
                        "ratio": value / against,
                    }
                )
    return records


def table(records: Iterable[dict[str, Any]]) -> str:
    """One line for each scheme."""
    lines = ["", f"{'bare exchange':<16}{'pairs':>14}{'ranks':>7}{'network':>9}{'ms':>9}{'/bound':>8}"]
    for r in records:
        if r["bench"] == "exchange" and r["baseline"] == "bound":
            lines.append(
                f"{r['scheme']:<16}{r['model']:>14}{r['ranks']:>7}{r['network']:>9}{r['value'] * 1e3:>9.2f}{r['ratio']:>8.2f}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
