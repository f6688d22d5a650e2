"""What the studies that train by train.py share: one run as figures, and a study that goes on where it was stopped."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from benchmarks.harness import records
from training import launch, loop, options, tasks

Labels = dict[str, Any]
Losses = Sequence[float | None]
"""By seed; None: the run diverged."""
CHOICE_SEED, SEEDS = 100, (0, 1, 2)
"""The seed that chooses a rate, and those that judge it."""
BAR = 0.02
"""As good as dense training is a loss at most this share above."""


def train(
    world: launch.World,
    command: Sequence[str],
    prepare: Callable[[loop.Run], Callable[[int], None] | None] = lambda run: None,
) -> Labels:
    """Trains once. The figures are the same on all ranks; a loss that is no number is null.

    Args:
        world: the ranks.
        command: options of train.py.
        prepare: is given the run before it starts, and returns what is called behind each step, or None.
    """
    run = loop.Run(options.parse(command), world)
    found = run.train(prepare(run) or (lambda done: None))
    loss = found["test_loss"]
    return {
        "loss": loss if math.isfinite(loss) else None,
        "accuracy": found["test_accuracy"],
        "bytes_sent_per_step": found["bytes_sent_per_step"],
        "step": found["step"],
    }


def keep_half(task: Any, second: bool) -> None:
    """Leaves one half of the task's held-out data: the first is for the choice, the second for the verdict."""
    if isinstance(task, tasks.Images):
        kept = _half(task.arrays.test_x, second), _half(task.arrays.test_y, second)
        task.arrays = replace(task.arrays, test_x=kept[0], test_y=kept[1])
    elif isinstance(task, tasks.Text):
        task.test = _half(task.test, second)
    else:
        task.corpus = replace(task.corpus, test=_half(task.corpus.test, second))


def _half(data: torch.Tensor, second: bool) -> torch.Tensor:
    middle = len(data) // 2
    return data[middle:] if second else data[:middle]


def best_rate(tried: Sequence[records.Record]) -> float:
    """The rate of the run with the least loss. A run that diverged is the worst."""
    return float(min(tried, key=lambda run: math.inf if run["loss"] is None else run["loss"])["lr"])


def best_rate_of(arm: Any, done: Sequence[records.Record]) -> float:
    """The rate with the least loss on the data of the choice. `arm` is a named tuple of labels."""
    return best_rate(records.select(done, **arm._asdict(), seed=CHOICE_SEED))


def if_left(arm: Any, lr: float, seed: int, done: Sequence[records.Record]) -> Iterator[Labels]:
    """The labels of a run of an arm, unless its record is there."""
    labels = {**arm._asdict(), "lr": records.rounded(lr), "seed": seed}
    if not records.select(done, **labels):
        yield labels


def train_on_half(world: launch.World, command: Sequence[str], seed: int) -> Labels:
    """As :func:`train`, on the half of the held-out data that the seed is for: the choice's or the verdict's."""
    return train(world, command, lambda run: keep_half(run.task, seed != CHOICE_SEED))


def beyond(tried: Sequence[float], best: float, most: int) -> float | None:
    """The next rate to try: half the lowest or twice the highest, where that is the best.

    None: the best is neither, `most` have been tried, or only one.
    """
    if not 1 < len(tried) < most or min(tried) < best < max(tried):
        return None
    return float(records.rounded(best / 2 if best == min(tried) else best * 2))


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


def above(losses: Losses, dense: Losses | None) -> float | None:
    """The share by which the mean loss is above dense's. None: there is no dense run, or one of them diverged."""
    if dense is None or None in losses or None in dense:
        return None
    return _mean(losses) / _mean(dense) - 1.0


def verdict(dense: Losses | None, others: Mapping[str, Losses]) -> str:
    """Which of the others, by name, are within the bar, and which not by more than the seeds differ."""
    within, near = [], []
    for name, losses in others.items():
        share_above = above(losses, dense)
        if dense is None or share_above is None:
            continue
        noise = math.hypot(_deviation(losses), _deviation(dense))
        if share_above <= BAR:
            within.append(name)
        elif _mean(losses) - _mean(dense) <= noise:
            near.append(name)
    text = f"Within {BAR:.0%} of dense's loss: {'; '.join(within) or 'none'}."
    if near:
        text += f" Above by less than the seeds differ (one standard deviation): {'; '.join(near)}."
    return text


def share(value: float | None) -> str:
    """A share above dense, as text."""
    return "-" if value is None else f"{value:+.1%}"


def spread(losses: Losses) -> str:
    """Mean and standard deviation as text; a seed without a loss diverged."""
    if None in losses:
        return "diverges"
    return f"{_mean(losses):.3f} ± {_deviation(losses):.3f}"


def _mean(losses: Losses) -> float:
    return statistics.mean(loss for loss in losses if loss is not None)


def _deviation(losses: Losses) -> float:
    known = [loss for loss in losses if loss is not None]
    return statistics.stdev(known) if len(known) > 1 else 0.0
