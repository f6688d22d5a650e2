"""One rank of `scripts/bench network`: times steps of every case of a job and lets rank 0 write one JSON line for each.

Run by `network_launch.run_ranks`: `network_rank.py JOB.json OUT.jsonl`. A job is a list of cases (`Case`).
"""

from __future__ import annotations

import gc
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_WARMUP = 2  # DDP lays its buckets anew after the first step
_WARMUP_POWERSGD = 4  # it begins to compress at the third step


@dataclass(frozen=True)
class Case:
    """One scheme on one model. `steps` are timed, fewer (at least 3) when `budget_s` is used up before."""

    scheme: str
    model: str
    density: float = 0.001
    steps: int = 20
    budget_s: float = 60.0
    bucket_mb: float | None = None


def main() -> None:
    """Runs the job that the command line names."""
    cases, out = [Case(**c) for c in json.loads(Path(sys.argv[1]).read_text())], Path(sys.argv[2])
    from benchmarks.network_launch import join

    rank, _ = join()
    import torch.distributed as dist

    for case in cases:
        figures = run_case(case, rank)
        if rank == 0:
            with out.open("a") as file:
                file.write(json.dumps(asdict(case) | figures) + "\n")
        gc.collect()
    dist.destroy_process_group()


def run_case(case: Case, rank: int) -> dict[str, Any]:
    """Median step time (the slowest rank's, step by step), our phases, and bytes counted twice.

    Returns:
        `seconds`: a list of step times; `phases`: median seconds of the slowest rank; `interface_bytes` and
        `counted_bytes`: sent per rank and step, the largest over ranks; `plan`: see `decided`. `auto` also gives the
        `density` that it chose.
    """
    import torch
    from benchmarks.network_models import MODELS, StandIn
    from benchmarks.network_schemes import AUTO, attach

    attached = attach(case.scheme, StandIn(MODELS[case.model](), seed=rank), case.density, case.bucket_mb)
    start = torch.zeros((), requires_grad=True)
    for _ in range(_WARMUP_POWERSGD if case.scheme.startswith("powersgd") else _WARMUP):
        _step(attached.model, start)
    figures = _timed_steps(case, attached, start)
    figures["plan"] = decided(attached.state.plan) if case.scheme == AUTO else None
    if figures["plan"]:
        figures["density"] = figures["plan"]["density"]
    if attached.state is not None:
        attached.state.close()
    return figures


def decided(plan: Any) -> dict[str, Any]:
    """A planner's decision in plain values; `promised_s`: seconds added to a step, of each candidate at its best bucket."""
    promised = {f"{p.scheme} at {p.density:g}": p.step_s for p in plan.predictions}
    return {
        "scheme": plan.scheme,
        "density": plan.density,
        "bucket_mb": plan.bucket_mb,
        "reason": plan.reason,
        "promised_s": promised,
    }


def _timed_steps(case: Case, attached: Any, start: Any) -> dict[str, Any]:
    from benchmarks.network_launch import check_crossed, interface_bytes

    rows: list[list[float]] = []
    began = time.monotonic()
    while len(rows) < case.steps and (len(rows) < 3 or _still(time.monotonic() - began < case.budget_s)):
        _settle()
        sent = interface_bytes()
        begun = time.perf_counter()
        _step(attached.model, start)
        seconds = time.perf_counter() - begun
        last = attached.state.reducer.last if attached.state is not None else None
        phases = [last.seconds[p] for p in ("select", "exchange", "write_back")] if last else [0.0] * 3
        counted = float(last.bytes_sent) if last else 0.0
        _settle()  # what others still send to us is acknowledged by now, and theirs is out
        rows.append([seconds, *phases, counted, float(interface_bytes() - sent)])
    check_crossed(sum(row[4] for row in rows), sum(row[5] for row in rows), f"{case.scheme} on {case.model}")
    slowest = _largest(rows)
    columns = list(zip(*slowest, strict=True))
    medians = [sorted(column)[len(column) // 2] for column in columns]
    return {
        "seconds": list(columns[0]),
        "phases": dict(zip(("select", "exchange", "write_back"), medians[1:4], strict=True)),
        "counted_bytes": medians[4],
        "interface_bytes": medians[5],
        "misses": int(attached.state.reducer.last.misses) if attached.state is not None else 0,
    }


def _step(model: Any, start: Any) -> None:
    model(start).backward()
    model.zero_grad(set_to_none=True)


def _settle() -> None:
    """A gloo barrier: few bytes (the same for every scheme), and ranks sleep in it; MPI's would take the others' core."""
    import torch.distributed as dist

    dist.barrier()


def _still(mine: bool) -> bool:
    import torch
    import torch.distributed as dist

    go_on = torch.tensor([mine], dtype=torch.int64)
    dist.all_reduce(go_on, op=dist.ReduceOp.MIN)
    return bool(go_on)


def _largest(rows: list[list[float]]) -> list[list[float]]:
    """Element by element the largest over ranks."""
    import torch
    import torch.distributed as dist

    table = torch.tensor(rows, dtype=torch.float64)
    dist.all_reduce(table, op=dist.ReduceOp.MAX)
    return [list(map(float, row)) for row in table]


if __name__ == "__main__":
    main()
