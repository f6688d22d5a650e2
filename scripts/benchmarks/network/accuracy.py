"""`scripts/bench accuracy`: loss against wall-clock at 100 Mbit/s, ours beside dense, fp16 and PowerSGD.

Needs root. Two jobs on 4 ranks: ResNet-20 on scikit-learn's digits, and a 2-layer LSTM language model of 1.6M
parameters on text that is on this machine. Every scheme trains for the same time on the same batches with the
same learning rate; momentum 0.9 stands in the optimizer, for ours in the error feedback (with factor
masking). Gradients are clipped to norm 1: for ours before they enter the memory, since what is cut off a
sparse average is lost. Ours begin with a density warm-up. Evaluation is not part of the time. All schemes of
a job run in one start of the ranks.
"""

from __future__ import annotations

import argparse
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from training.tasks import Share, make

from commhooks import ErrorFeedback, ExponentialWarmup

from ..harness import names, study
from ..harness.figure import WIDTH, color, figure, label_ends
from ..harness.namespaces import NETWORKS
from ..harness.ranks import all_ranks, settle
from ..harness.records import Record, select
from .schemes import Attached, attach, is_ours

SCHEMES = ("dense", "fp16", "powersgd2", "topk", "gtopk")
JOBS: dict[str, dict[str, Any]] = {
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
_MOMENTUM, _CLIP_NORM = 0.9, 1.0
_LOG_EVERY = 5
_TIMEOUT_S = 3600.0


def measure(case: dict[str, Any], rank: int, size: int) -> Iterator[Record]:
    """Yields one record: one scheme's run.

    `points` is a list of (seconds, step, training loss averaged over ranks and steps since the point before);
    `test_loss` and `test_accuracy` are those at the end.
    """
    torch.manual_seed(0)
    job = JOBS[case["job"]]
    task = make(Namespace(**job), Share(rank, size, job["batch_size"], 0), torch.device("cpu"))
    attached, optimizer = _attached(case, task, job["lr"])
    points = _train(case, task, attached, optimizer)
    sums = task.evaluate(task.model.eval())
    dist.all_reduce(sums)
    if attached.state is not None:
        attached.state.close()
    tested = {"test_loss": float(sums[0] / sums[2]), "test_accuracy": float(sums[1] / sums[2])}
    yield case | {"points": points} | tested


def _attached(case: dict[str, Any], task: Any, lr: float) -> tuple[Attached, torch.optim.Optimizer]:
    """The scheme on the task's model, momentum and clipping in the memory for ours, and the optimizer."""
    memory = None
    if is_ours(case["scheme"]):
        memory = ErrorFeedback(momentum=_MOMENTUM, factor_masking=True, clip_norm=_CLIP_NORM)
    density = case["density"]
    if case["warmup"]:
        density = ExponentialWarmup(case["density"], case["warmup"], start=0.1)
    attached = attach(case["scheme"], task.model, density, memory=memory)
    momentum = 0.0 if memory else _MOMENTUM
    return attached, torch.optim.SGD(attached.model.parameters(), lr=lr, momentum=momentum)


def _train(
    case: dict[str, Any], task: Any, attached: Attached, optimizer: torch.optim.Optimizer
) -> list[tuple[float, int, float]]:
    """Trains until the time is over on one rank; the points of the record."""
    limit_s = JOBS[case["job"]]["seconds"] * case["scale"]
    points: list[tuple[float, int, float]] = []
    losses: list[float] = []
    carry, spent, step = task.start(), 0.0, 0
    while step < case["most_steps"] and all_ranks(spent < limit_s):
        epoch, place = divmod(step, task.steps_per_epoch)
        carry = task.start() if place == 0 else carry
        settle()
        begun = time.perf_counter()
        optimizer.zero_grad()
        loss, carry = task.loss(attached.model, epoch, place, carry)
        loss.backward()
        if attached.state is None:
            torch.nn.utils.clip_grad_norm_(attached.model.parameters(), _CLIP_NORM)
        optimizer.step()
        spent += time.perf_counter() - begun
        losses.append(float(loss.detach()))
        step += 1
        if step % _LOG_EVERY == 0:
            mean = torch.tensor(sum(losses) / len(losses), dtype=torch.float64)
            dist.all_reduce(mean)
            points.append((spent, step, float(mean) / dist.get_world_size()))
            losses.clear()
    return points


def smooth(losses: Sequence[float], over: int = 4) -> list[float]:
    """Each loss averaged with up to `over` before it."""
    windows = [losses[max(0, i - over) : i + 1] for i in range(len(losses))]
    return [sum(window) / len(window) for window in windows]


def seconds_to(record: Record, loss: float) -> float | None:
    """Seconds of training until the smoothed loss was at most `loss`; None: never."""
    points = record["points"]
    for (seconds, _, _), reached in zip(points, smooth([point[2] for point in points]), strict=True):
        if reached <= loss:
            return float(seconds)
    return None


def step_s(record: Record) -> float:
    """Mean seconds of a step."""
    seconds, steps, _ = record["points"][-1]
    return float(seconds / steps)


def table(records: Sequence[Record]) -> str:
    """A line for each run."""
    lines = []
    for r in records:
        seconds, steps, loss = r["points"][-1]
        ended = f"{seconds:.1f} s, {steps} steps, training loss {loss:.3f}"
        lines.append(f"{r['job']} {r['scheme']}: {ended}, test accuracy {r['test_accuracy']:.1%}")
    return "\n".join(lines)


def plot(records: Sequence[Record], path: Path) -> None:
    """Training loss against seconds, a panel for each job."""
    jobs = list(dict.fromkeys(r["job"] for r in records))
    with figure(path, 1, len(jobs), figsize=(WIDTH, 3.4)) as (drawn, axes):
        for axis, job in zip(axes[0], jobs, strict=True):
            lines = []
            for r in select(records, job=job):
                seconds, _, losses = zip(*r["points"], strict=True)
                label = names.SCHEMES[r["scheme"]].partition(",")[0]
                label += f", density {r['density']:g}" if is_ours(r["scheme"]) else ""
                lines += axis.plot(seconds, smooth(losses), color=color(r["scheme"]), label=label)
            axis.set(
                xscale="log",
                yscale="log",
                xlabel="seconds of training",
                ylabel="training loss",
                title=names.MODELS.get(job, job.upper()).partition(",")[0],
            )
            label_ends(axis, lines)
        drawn.suptitle(f"Measured: training loss, 4 ranks, {names.NETWORKS[records[0]['network']]}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `scripts/bench accuracy`."""
    study.add_arguments(parser)
    add = parser.add_argument
    add("--network", default="100mbit", choices=NETWORKS)
    add("--jobs", nargs="+", default=list(JOBS), choices=JOBS)
    add("--most-steps", type=int, default=5000)
    add("--scale", type=float, default=1.0, help="of the time each scheme gets")
    add("--warmup", type=int, default=50, help="steps of density warm-up from 0.1; 0: none")
    add("--density", type=float, default=0.01)


def run(options: argparse.Namespace) -> int:
    """Trains every scheme on both jobs, writes and draws."""
    shared = {name: getattr(options, name) for name in ("most_steps", "scale", "warmup", "density")}
    jobs = [
        study.Job(
            "accuracy", 4, options.network, [{"job": job, "scheme": s, **shared} for s in SCHEMES], _TIMEOUT_S
        )
        for job in options.jobs
    ]
    return study.run(jobs, options, table, plot)
