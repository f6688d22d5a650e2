"""What the planner predicts beside what it takes, on loopback: one step's buckets, dense and top-k, gloo and MPI.

    python scripts/benchmarks/plan_check.py --json docs/performance/plan-check.json

Turn by turn every rank probes and then times the steps it has just predicted, so that both see the same machine. A step is
all buckets of a bare gradient through a `SparseState`, without backward; its time is the slowest rank's. `predicted_s` and
`least_s` are the least over all turns (a quiet machine's, and the probe takes the least of its measurements too), `ratio` is
their quotient; `least_ratio` and `largest_ratio` are those of single turns, `median_s` is the median step.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MODELS = {"small": (269_722, 1), "large": (19_660_800, 3)}
"""Name: parameters and equal buckets (25 MB each for the large one)."""
SCHEMES = (("dense", 1.0), ("topk", 0.01), ("topk", 0.001))
TRANSPORTS = ("distributed", "mpi")
_STEPS = {"small": 20, "large": 8}
_MEASURED = ("predicted_s", "least_s", "median_s", "probe_s")


def main() -> int:
    """Starts the ranks, prints a table and writes records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out-of-rank", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.out_of_rank:
        _rank(options.turns, options.out_of_rank)
        return 0
    with tempfile.TemporaryDirectory(prefix="commhooks-plan-") as folder:
        out = Path(folder) / "rows.json"
        launcher = [str(Path(sys.executable).with_name("mpiexec")), "-n", str(options.ranks)]
        program = [sys.executable, "-m", "mpi4py", __file__, "--turns", str(options.turns)]
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        env = os.environ | {
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }
        subprocess.run([*launcher, *program, "--out-of-rank", str(out)], env=env, check=True, timeout=600)
        records = [summary(row, options.ranks) for row in json.loads(out.read_text())]
    for record in records:
        print(line(record))
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n")
    return 0


def summary(row: dict[str, Any], ranks: int) -> dict[str, Any]:
    """One record of a case's turns."""
    ratios = sorted(p / m for p, m in zip(row["predicted_s"], row["least_s"], strict=True))
    predicted_s, least_s = min(row["predicted_s"]), min(row["least_s"])
    return {
        "bench": "plan_check",
        **{name: row[name] for name in ("transport", "model", "numel", "buckets", "scheme", "density")},
        "ranks": ranks,
        "network": "loopback",
        "predicted_s": predicted_s,
        "least_s": least_s,
        "median_s": median(row["median_s"]),
        "probe_s": median(row["probe_s"]),
        "ratio": predicted_s / least_s,
        "least_ratio": ratios[0],
        "largest_ratio": ratios[-1],
        "turns": len(ratios),
    }


def line(record: dict[str, Any]) -> str:
    """A record as a line of a table."""
    what = f"{record['transport']:<12} {record['model']:<6} {record['scheme']:<6} {record['density']:<6g}"
    milliseconds = [record[name] * 1e3 for name in ("predicted_s", "least_s", "median_s")]
    times = "predicted {:8.2f} ms, least {:8.2f} ms, median {:8.2f} ms".format(*milliseconds)
    spread = f"{record['least_ratio']:.2f} to {record['largest_ratio']:.2f}"
    return f"{what} {times}, ratio {record['ratio']:.2f} (single turns {spread})"


def _rank(turns: int, out: Path) -> None:
    """One rank: MPI and gloo over the same ranks, then all cases; rank 0 writes the rows."""
    import mpi4py

    mpi4py.rc.thread_level = "multiple"
    import torch
    import torch.distributed as dist
    from mpi4py import MPI

    torch.set_num_threads(1)
    rank, size = MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size()
    store = dist.TCPStore("127.0.0.1", 0, size, True, wait_for_workers=False) if rank == 0 else None
    port = MPI.COMM_WORLD.bcast(store.port if store else None)
    store = store or dist.TCPStore("127.0.0.1", port, size, False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    rows = []
    for transport in TRANSPORTS:
        for model, (numel, buckets) in MODELS.items():
            shared = {"transport": transport, "model": model, "numel": numel, "buckets": buckets}
            cases = [
                shared | {"scheme": s, "density": d} | {name: [] for name in _MEASURED} for s, d in SCHEMES
            ]
            for _ in range(turns):
                _turn(cases, size)
            rows += cases
    if rank == 0:
        out.write_text(json.dumps(rows))
    dist.destroy_process_group()


def _turn(cases: list[dict[str, Any]], world_size: int) -> None:
    """Probes once and times every case; the figures are appended to them."""
    from commhooks.planner import probe, step_s
    from commhooks.transports import make

    transport, buckets = cases[0]["transport"], cases[0]["buckets"]
    opened = make(transport)
    began = time.perf_counter()
    costs = probe(opened, cases[0]["numel"])
    probe_s = time.perf_counter() - began
    opened.close()
    for case in cases:
        numel = case["numel"] // buckets
        k = max(1, int(case["density"] * numel))
        times = _step_times(transport, case, numel, buckets, _STEPS[case["model"]])
        predicted_s = buckets * step_s(costs, case["scheme"], numel, k, world_size)
        for name, value in zip(_MEASURED, (predicted_s, min(times), median(times), probe_s), strict=True):
            case[name].append(value)


def _step_times(transport: str, case: dict[str, Any], numel: int, buckets: int, steps: int) -> list[float]:
    """The slowest rank's seconds for all buckets, step by step."""
    import torch
    import torch.distributed as dist

    from commhooks import SparseState

    if case["scheme"] == "dense":
        state = SparseState.dense(transport)
    else:
        state = SparseState.topk(case["density"], transport)
    gradients = [torch.randn(numel) for _ in range(buckets)]
    parameters = [torch.empty(numel) for _ in range(buckets)]
    times = []
    for _ in range(steps + 2):  # the first ones open connections and touch memory
        buffers = [g.clone() for g in gradients]
        dist.barrier()
        began = time.perf_counter()
        futures = [state.submit(b, i, (parameters[i],), i == buckets - 1) for i, b in enumerate(buffers)]
        for future in futures:
            future.wait()
        times.append(time.perf_counter() - began)
    state.close()
    slowest = torch.tensor(times[2:], dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return [float(t) for t in slowest]


if __name__ == "__main__":
    sys.exit(main())
