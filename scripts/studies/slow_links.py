"""The study of slow links: what few bits cost a GPT of 1M parameters under AdamW and Muon (scripts/accuracy --slow-links).

Real ranks train by train.py. Every method trains at three rates with the first seed, and at its best one with the
others. Each run is a record as soon as it ends, and a study that is started again goes on behind the last record.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from benchmarks.harness import records
from benchmarks.harness.records import Record
from training import launch, loop

from . import trained

STEPS = 1204
"""Steps of a run: whole blocks of 4 and of 14."""
RATES = (3e-3, 1.5e-3, 6e-3)
SEEDS = (0, 1, 2)
CURVE_EVERY, CURVE_WINDOWS = 56, 256
"""Steps between the points of a run's curve, whole blocks too, and the windows of held-out text they are of."""
GIVEN = (
    "--model",
    "gpt",
    "--level",
    "byte",
    "--window",
    96,
    "--batch-size",
    8,
    "--sample",
    0,
    "--timeout",
    600,
    "--quiet",
)
MUON, ADAMW = ("--optimizer", "muon"), ("--optimizer", "adamw")
DENSE = ("--scheme", "dense")


class Method(NamedTuple):
    """What is compared.

    Attributes:
        text: what the page calls it.
        given: options of train.py.
        ranks: with how many it is trained.
    """

    text: str
    given: Sequence[Any]
    ranks: tuple[int, ...] = (4,)


def _wired(period: int, mu: float, *optimizer: Any) -> tuple[Any, ...]:
    wire = f"--averaging diloco --wire-bits 1 --period {period} --mu {mu} --outer-lr 1"
    return (*wire.split(), *optimizer)


METHODS = {
    "dense adamw": Method("dense AdamW", (*DENSE, *ADAMW)),
    "muon k4": Method("Muon, 1 bit every 4 steps, outer Nesterov 0.5", _wired(4, 0.5, *MUON), (4, 8)),
    "dense muon": Method("dense Muon", (*DENSE, *MUON)),
    "muon k14": Method("Muon, 1 bit every 14 steps, outer Nesterov 0.5", _wired(14, 0.5, *MUON)),
    "lowbit4 adamw": Method("AdamW, gradients in 4 bits", ("--scheme", "lowbit", *ADAMW)),
    "adamw k4": Method("AdamW (beta2 0.99), 1 bit every 4 steps", _wired(4, 0.0, *ADAMW, "--beta2", 0.99)),
}
QUICK = ("--text-size", 20_000, "--window", 16, "--batch-size", 1)


def command(method: str, lr: float, seed: int, steps: int = STEPS) -> list[str]:
    """The options of train.py for one run; one of few steps reads few data."""
    given = [*GIVEN, *METHODS[method].given, "--steps", steps, "--lr", lr, "--seed", seed]
    return [str(part) for part in (given if steps == STEPS else [*given, *QUICK])]


def left(
    done: Sequence[Record], ranks: int, rates: Sequence[float], seeds: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """What is left to run on `ranks` ranks: every method at the first rate, then at the others, then the seeds.

    With more ranks than four a method's rate is the one that is best on four.

    Args:
        done: records, which may grow meanwhile: a method's best rate is read from them.
        ranks: of this job.
        rates: the first is every method's first run.
        seeds: the first chooses the rate.
    """
    chosen = [name for name, method in METHODS.items() if ranks in method.ranks]
    tried = [(lr, seeds[0]) for lr in rates] if ranks == 4 else [(None, seeds[0])]
    for lr, seed in [*tried, *((None, seed) for seed in seeds[1:])]:
        for method in chosen:
            rate = best_rate(done, method, seeds[0]) if lr is None else lr
            labels = {"method": method, "ranks": ranks, "lr": rate, "seed": seed}
            if not records.select(done, **labels):
                yield labels


def best_rate(done: Sequence[Record], method: str, seed: int) -> float:
    """The rate with the least loss of a method on four ranks.

    Raises:
        ValueError: none has been tried on four ranks.
    """
    tried = records.select(done, bench="run", method=method, ranks=4, seed=seed)
    if not tried:
        raise ValueError(f"{method} has no run on 4 ranks yet, which chooses its rate")
    return trained.best_rate(tried)


def study(
    world: launch.World,
    file: Path,
    steps: int = STEPS,
    rates: Sequence[float] = RATES,
    seeds: Sequence[int] = SEEDS,
) -> list[Record]:
    """Runs what the file lacks on this job's number of ranks. All ranks call it."""
    return trained.study(
        world,
        file,
        {"steps": steps, "rates": list(rates), "seeds": list(seeds)},
        lambda done: left(done, world.size, rates, seeds),
        lambda labels: one(world, command(labels["method"], labels["lr"], labels["seed"], steps)),
    )


def one(world: launch.World, given: Sequence[str]) -> dict[str, Any]:
    """Trains once: the figures of `trained.train`, and `curve`, the loss every CURVE_EVERY steps and at the end."""
    curve: list[float | None] = []

    def prepare(run: loop.Run) -> Callable[[int], None]:
        part = copy.copy(run.task)
        tokens = CURVE_WINDOWS * part.window + 1
        part.corpus = replace(part.corpus, test=part.corpus.test[:tokens])

        def after_step(done: int) -> None:
            if done % CURVE_EVERY == 0 or done == run.total:
                loss, _, count = run.held_out(part)
                curve.append(loss / count if math.isfinite(loss) else None)

        return after_step

    return trained.train(world, given, prepare) | {"curve": curve}


class Row(NamedTuple):
    """What is known of one method on one number of ranks, at its best rate so far.

    Attributes:
        method: a name in METHODS.
        ranks: how many.
        runs, wanted: how many runs there are, and how many a whole study has.
        lr: the best rate so far.
        losses: at that rate, by seed; None: it diverged. Empty: there is no run yet.
        bytes_sent_per_step: of a rank.
    """

    method: str
    ranks: int
    runs: int
    wanted: int
    lr: float
    losses: list[float | None]
    bytes_sent_per_step: float

    @property
    def loss(self) -> float | None:
        """The median over the seeds; None: there is no run yet, or one diverged."""
        known = [loss for loss in self.losses if loss is not None]
        return statistics.median(known) if known and len(known) == len(self.losses) else None


def rows(found: Sequence[Record]) -> list[Row]:
    """All methods, those without a run too, in their order."""
    about, result = found[0], []
    for name, method in METHODS.items():
        for ranks in method.ranks:
            rates = len(about["rates"]) if ranks == 4 else 1
            wanted = rates + len(about["seeds"]) - 1
            runs = records.select(found, bench="run", method=name, ranks=ranks)
            lr = best_rate(found, name, about["seeds"][0]) if runs else math.nan
            best = records.select(runs, lr=lr)
            losses = [run["loss"] for run in sorted(best, key=lambda run: run["seed"])]
            sent = runs[0]["bytes_sent_per_step"] if runs else math.nan
            result.append(Row(name, ranks, len(runs), wanted, lr, losses, sent))
    return result


def main() -> None:
    """Runs the study, or what is left of it; `scripts/bench render` writes the page."""
    p = argparse.ArgumentParser(prog="scripts/accuracy --slow-links", description=__doc__)
    p.add_argument("--output", type=Path, default=records.FOLDER, help="folder (docs/performance)")
    given = p.parse_args()
    torch.set_num_threads(1)
    with launch.session(timeout_s=600.0) as world:
        study(world, given.output / "slow-links.jsonl")
    launch.leave()


if __name__ == "__main__":
    main()
