"""What the studies that train by train.py share: one run as figures, and a study that goes on where it was stopped."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from benchmarks.harness import records
from training import launch, loop, options

Labels = dict[str, Any]


def train(
    world: launch.World, command: Sequence[str], prepare: Callable[[loop.Run], None] = lambda run: None
) -> Labels:
    """Trains once. The figures are the same on all ranks; a loss that is no number is null.

    Args:
        world: the ranks.
        command: options of train.py.
        prepare: is given the run before it starts.
    """
    run = loop.Run(options.parse(command), world)
    prepare(run)
    found = run.train()
    loss = found["test_loss"]
    return {
        "loss": loss if math.isfinite(loss) else None,
        "accuracy": found["test_accuracy"],
        "bytes_sent_per_step": found["bytes_sent_per_step"],
        "step": found["step"],
    }


def best_rate(tried: Sequence[records.Record]) -> float:
    """The rate of the run with the least loss. A run that diverged is the worst."""
    return float(min(tried, key=lambda run: math.inf if run["loss"] is None else run["loss"])["lr"])


def study(
    world: launch.World,
    file: Path,
    about: Labels,
    left: Callable[[list[records.Record]], Iterable[Labels]],
    one: Callable[[Labels], Labels],
) -> list[records.Record]:
    """Runs what the file lacks and writes each record as it comes. All ranks call it.

    Args:
        world: the ranks.
        file: of the records.
        about: the first record of a new file, without its `bench`.
        left: given the records, which grow meanwhile, what is left to run, as labels.
        one: trains what the labels say and returns the figures.
    """
    shared: list[Any] = [records.load(file) if world.is_main and file.exists() else []]
    dist.broadcast_object_list(shared)
    done: list[records.Record] = shared[0]
    if not done:
        done.append({"bench": "study", **about})
    started = time.perf_counter()
    for labels in left(done):
        done.append(records.rounded({"bench": "run", **labels, **one(labels)}))
        if world.is_main:
            records.save(done, file)
            spent = time.perf_counter() - started
            print(
                f"{file.stem}: {len(done) - 1} runs, {spent:.0f} s: {done[-1]}", file=sys.stderr, flush=True
            )
    return done
