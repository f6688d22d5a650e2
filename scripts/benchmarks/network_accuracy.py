"""Time to accuracy across the 100 Mbit/s network: loss against wall-clock for dense, fp16, PowerSGD, top-k and gTop-k.

    python scripts/benchmarks/network_accuracy.py --json docs/performance/network-accuracy.json --plot docs/performance/network-accuracy.png

Run as root from the checkout. Two jobs on 4 ranks: ResNet-20 on scikit-learn's digits, and a 2-layer LSTM language model
of 1.6M parameters on text that is on this machine. Every scheme trains for the same time on the same batches with the same
learning rate; momentum 0.9 stands in the optimizer, for ours in the error feedback (with factor masking). Gradients are
clipped to norm 1: for ours before they enter the memory, since what is cut off a sparse average is lost. Ours begin
with a density warm-up. Evaluation is not part of the time. All schemes of a job run in one start of the ranks.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from benchmarks.namespaces import NETWORKS, Network, why_not
from benchmarks.network_limits import verify

SCHEMES = ("dense", "fp16", "powersgd2", "topk", "gtopk")
_JOBS: dict[str, dict[str, Any]] = {
    "resnet20": {
        "task": "digits",
        "model": "resnet20",
        "data": None,
        "hidden": 0,
        "batch_size": 16,
        "lr": 0.05,
        "seconds": 40.0,
    },
    "lstm": {
        "task": "text",
        "model": "lstm",
        "level": "word",
        "text_size": 400_000,
        "vocabulary": 2000,
        "hidden": 256,
        "dropout": 0.0,
        "window": 20,
        "batch_size": 4,
        "lr": 1.0,
        "seconds": 90.0,
    },
}
_LOG_EVERY = 5


def train(case: dict[str, Any], rank: int, size: int) -> dict[str, Any]:
    """One scheme's run on this rank; `points`: (seconds, step, training loss averaged over ranks), `test`: at the end."""
    import torch
    import torch.distributed as dist
    from benchmarks.network_schemes import attach, is_ours
    from training.tasks import Share, make

    from commhooks import ErrorFeedback, ExponentialWarmup

    torch.manual_seed(0)
    job = _JOBS[case["job"]]
    task = make(Namespace(**job), Share(rank, size, job["batch_size"], 0), torch.device("cpu"))
    memory = (
        ErrorFeedback(momentum=0.9, factor_masking=True, clip_norm=1.0) if is_ours(case["scheme"]) else None
    )
    density = (
        ExponentialWarmup(case["density"], case["warmup"], start=0.1) if case["warmup"] else case["density"]
    )
    attached = attach(case["scheme"], task.model, density, memory=memory)
    optimizer = torch.optim.SGD(attached.model.parameters(), lr=job["lr"], momentum=0.0 if memory else 0.9)
    points: list[tuple[float, int, float]] = []
    losses: list[float] = []
    carry, spent = task.start(), 0.0
    step = 0
    while step < case["most_steps"] and _goes_on(spent < job["seconds"] * case["scale"]):
        epoch, place = divmod(step, task.steps_per_epoch)
        carry = task.start() if place == 0 else carry
        dist.barrier()
        begun = time.perf_counter()
        optimizer.zero_grad()
        loss, carry = task.loss(attached.model, epoch, place, carry)
        loss.backward()
        if memory is None:
            torch.nn.utils.clip_grad_norm_(attached.model.parameters(), 1.0)
        optimizer.step()
        spent += time.perf_counter() - begun
        losses.append(float(loss.detach()))
        step += 1
        if step % _LOG_EVERY == 0:
            mean = torch.tensor(sum(losses) / len(losses), dtype=torch.float64)
            dist.all_reduce(mean)
            points.append((spent, step, float(mean) / size))
            losses.clear()
    sums = task.evaluate(task.model.eval())
    dist.all_reduce(sums)
    if attached.state is not None:
        attached.state.close()
    return {
        "points": points,
        "test_loss": float(sums[0] / sums[2]),
        "test_accuracy": float(sums[1] / sums[2]),
    }


def _goes_on(mine: bool) -> bool:
    """Whether every rank still has time."""
    import torch
    import torch.distributed as dist

    vote = torch.tensor([int(mine)])
    dist.all_reduce(vote, op=dist.ReduceOp.MIN)
    return bool(vote)


def rank_main(job_file: Path, out: Path) -> None:
    """On a rank: all cases of the job file."""
    from benchmarks.network_launch import join

    rank, size = join()
    for case in json.loads(job_file.read_text()):
        found = case | train(case, rank, size)
        if rank == 0:
            with out.open("a") as file:
                file.write(json.dumps(found) + "\n")


def _smooth(values: list[float], over: int = 4) -> list[float]:
    """Each value averaged with up to `over` before it."""
    return [
        sum(values[max(0, i - over) : i + 1]) / len(values[max(0, i - over) : i + 1])
        for i in range(len(values))
    ]


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Training loss against seconds, a panel for each job."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    jobs = list(dict.fromkeys(r["job"] for r in results))
    figure, axes = pyplot.subplots(1, len(jobs), figsize=(6 * len(jobs), 4.4), squeeze=False)
    for axis, job in zip(axes[0], jobs, strict=True):
        for r in (r for r in results if r["job"] == job):
            label = r["scheme"] + (f" ({r['density']:g})" if r["scheme"] in ("topk", "gtopk") else "")
            smooth = _smooth([p[2] for p in r["points"]])
            axis.plot([p[0] for p in r["points"]], smooth, label=label)
        axis.set_xscale("log")
        axis.set_xlabel("seconds")
        axis.set_ylabel("training loss")
        axis.set_title(f"{job}, 4 ranks, {results[0]['network']}")
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    """Trains every scheme on both jobs, writes and draws."""
    if len(sys.argv) == 3 and sys.argv[1].endswith("job.json"):
        rank_main(Path(sys.argv[1]), Path(sys.argv[2]))
        return 0
    from benchmarks.network import run_job

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--network", default="100mbit", choices=NETWORKS)
    parser.add_argument("--jobs", nargs="+", default=list(_JOBS), choices=_JOBS)
    parser.add_argument("--most-steps", type=int, default=5000)
    parser.add_argument("--scale", type=float, default=1.0, help="of the time each scheme gets")
    parser.add_argument("--warmup", type=int, default=50, help="steps of density warm-up from 0.1; 0: none")
    parser.add_argument("--density", type=float, default=0.01)
    options = parser.parse_args()
    reason = why_not()
    if reason is not None:
        print(reason, file=sys.stderr)
        return 2
    results, failed = [], 0
    with Network(4, NETWORKS[options.network]) as network:
        verify(network)
        for job in options.jobs:
            shared = {
                "job": job,
                "most_steps": options.most_steps,
                "scale": options.scale,
                "warmup": options.warmup,
                "density": options.density,
                "network": options.network,
            }
            found, error = run_job(
                network, "network_accuracy.py", [shared | {"scheme": s} for s in SCHEMES], 3600
            )
            results += found
            for r in found:
                print(
                    f"{job} {r['scheme']}: {r['points'][-1]}, accuracy {r['test_accuracy']:.3f}", flush=True
                )
            if error is not None:
                failed = 1
                print(f"failed: {error}", file=sys.stderr)
            options.json.write_text(json.dumps(results, indent=1) + "\n")
    if options.plot:
        plot(results, options.plot)
    return failed


if __name__ == "__main__":
    sys.exit(main())
