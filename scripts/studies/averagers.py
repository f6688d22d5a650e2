"""The study of averagers: a small GPT that averages models every H steps under AdamW (scripts/accuracy --averagers).

The GPT and its data are those of the study of recipes. Every arm trains at three inner rates, is judged at its best, and
that on three other seeds. The rate is chosen on one half of the held-out data, and the verdict is the loss on the other
half. When all arms are judged, those whose best rate is the lowest or the highest get the next one beyond. Each run is a
record in averagers.jsonl as soon as it ends. A study that is started again goes on behind the last record.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from benchmarks.harness import records
from benchmarks.harness.records import Record
from training import launch

from . import recipes, trained

FOLDER = records.ROOT / "docs" / "results"
STEPS = 300
PERIODS = (10, 30)
RATES = (0.003, 0.0015, 0.006)
"""Inner rates of every arm. The study of recipes found 0.006 best for dense training, of 0.00075 to 0.012."""
MOST_RATES = 5
MU = 0.5
"""Of M-AVG. 0.7 lets a change act 3.3 times, 0.5 twice, and 300 steps have 30 or 10 changes."""
DENSITY = 0.05
"""Of the sparse reducer. A place is sent after about 1 / density synchronisations: a study has 30 or 10."""
TIMEOUT_S = 600


class Arm(NamedTuple):
    """What is compared: a row of the table.

    Attributes:
        averager: a name in AVERAGERS.
        period: local steps between two synchronisations; 1: gradients are reduced at every step.
    """

    averager: str
    period: int


DENSE = "dense"
# A sparse reducer's outer step is plain: docs/averaging.md has SGD(lr=1) for it, as SparseLoCo has. What the memory keeps
# back arrives late and acts as a momentum does.
AVERAGERS: dict[str, tuple[Any, ...]] = {
    DENSE: ("--scheme", "dense"),
    "Local SGD": ("--averaging", "local"),
    "M-AVG": ("--averaging", "block", "--mu", MU),
    "DiLoCo": ("--averaging", "diloco", "--outer-lr", 0.7, "--mu", 0.9),
    "DiLoCo, top-k": (
        *("--averaging", "diloco", "--outer-lr", 1, "--mu", 0),
        *("--scheme", "topk", "--density", DENSITY),
    ),
}
GPT = (*recipes.NETWORKS["gpt"].given, *recipes.OPTIMIZERS["adamw"])
QUICK = ("--model", "mlp", "--hidden", 8, "--batch-size", 16, "--optimizer", "adamw")


def arms() -> Iterator[Arm]:
    """All rows: dense, then the averagers at each period."""
    yield Arm(DENSE, 1)
    for period in PERIODS:
        for averager in AVERAGERS:
            if averager != DENSE:
                yield Arm(averager, period)


def command(arm: Arm, lr: float, seed: int, quick: bool = False) -> list[str]:
    """The options of train.py for one run; a quick one trains an MLP for 30 steps."""
    given = [*(QUICK if quick else GPT), *AVERAGERS[arm.averager], "--lr", lr, "--seed", seed]
    given += ["--steps", max(PERIODS) if quick else STEPS, "--timeout", TIMEOUT_S, "--quiet"]
    if arm.averager != DENSE:
        given += ["--period", arm.period]
    return [str(part) for part in given]


def left(done: Sequence[Record], rates: Sequence[float], seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """What is left to run, as labels of records: every arm at all rates and seeds, then the rates beyond.

    Args:
        done: records, which may grow meanwhile: an arm's best rate is read from them.
        rates: every arm's.
        seeds: of the verdict, which run at the arm's best rate.
    """
    for arm in arms():
        for lr in rates:
            yield from _if_left(arm, lr, trained.CHOICE_SEED, done)
        for seed in seeds:
            yield from _if_left(arm, best_rate(arm, done), seed, done)
    for arm in arms():
        tried = list(rates)
        while (lr_beyond := trained.beyond(tried, best_rate(arm, done), MOST_RATES)) is not None:
            tried.append(lr_beyond)
            yield from _if_left(arm, lr_beyond, trained.CHOICE_SEED, done)
        for seed in seeds:
            yield from _if_left(arm, best_rate(arm, done), seed, done)


def _if_left(arm: Arm, lr: float, seed: int, done: Sequence[Record]) -> Iterator[dict[str, Any]]:
    labels = {**arm._asdict(), "lr": records.rounded(lr), "seed": seed}
    if not records.select(done, **labels):
        yield labels


def best_rate(arm: Arm, done: Sequence[Record]) -> float:
    """The rate with the least loss on the data of the choice."""
    return trained.best_rate(records.select(done, **arm._asdict(), seed=trained.CHOICE_SEED))


def one(world: launch.World, labels: dict[str, Any], quick: bool = False) -> dict[str, Any]:
    """The figures of one run, on the half of the held-out data that its seed is for."""
    arm = Arm(labels["averager"], labels["period"])
    second = labels["seed"] != trained.CHOICE_SEED
    given = command(arm, labels["lr"], labels["seed"], quick)
    return trained.train(world, given, lambda run: trained.keep_half(run.task, second))


def study(
    world: launch.World,
    file: Path,
    rates: Sequence[float] = RATES,
    seeds: Sequence[int] = trained.SEEDS,
    quick: bool = False,
) -> list[Record]:
    """Runs what the file lacks and writes each record as it comes. All ranks call it."""
    about = {"ranks": world.size, "steps": max(PERIODS) if quick else STEPS}
    return trained.study(
        world,
        file,
        {**about, "rates": list(rates), "seeds": list(seeds)},
        lambda done: left(done, rates, seeds),
        lambda labels: one(world, labels, quick),
    )


class Row(NamedTuple):
    """One arm's verdict.

    Attributes:
        lr: the best inner rate.
        losses: at that rate, by seed.
        above: share by which their mean is above dense's; None: the arm or dense diverged.
        bytes_sent_per_step: of a rank, mean over the run.
        at_edge: no lower rate was tried, or no higher one.
    """

    arm: Arm
    lr: float
    losses: trained.Losses
    above: float | None
    bytes_sent_per_step: float
    at_edge: bool


def rows(found: Sequence[Record]) -> list[Row]:
    """The verdicts of all arms that ran on every seed, in the order of the study.

    An arm whose seeds have not all run at its best rate yet is judged at the best of the rates at which they have.
    """
    about, result, dense = found[0], [], None
    for arm in arms():
        runs = records.select(found, bench="run", **arm._asdict())
        choice = records.select(runs, seed=trained.CHOICE_SEED)
        judged = [run for run in runs if run["seed"] in about["seeds"]]
        whole = [run for run in choice if len(records.select(judged, lr=run["lr"])) == len(about["seeds"])]
        if not whole:
            continue
        lr = trained.best_rate(whole)
        mine = sorted(records.select(judged, lr=lr), key=lambda run: run["seed"])
        losses = [run["loss"] for run in mine]
        if arm.averager == DENSE:
            dense = losses
        sent = statistics.mean(run["bytes_sent_per_step"] for run in mine)
        tried = [run["lr"] for run in choice]
        at_edge = lr in (min(tried), max(tried))
        result.append(Row(arm, lr, losses, trained.above(losses, dense), sent, at_edge))
    return result


def main() -> None:
    """Runs the study, or what is left of it."""
    p = argparse.ArgumentParser(prog="scripts/accuracy --averagers", description=__doc__)
    p.add_argument("--output", type=Path, default=FOLDER, help="folder (docs/results)")
    p.add_argument(
        "--quick", action="store_true", help="an MLP, one rate and seed: seconds, to see that it runs"
    )
    given = p.parse_args()
    if given.quick and given.output == FOLDER:
        p.error("--quick measures nothing worth keeping: give it another --output")
    torch.set_num_threads(1)
    quick: Any = ((0.003,), (0,), True) if given.quick else ()
    with launch.session(timeout_s=float(TIMEOUT_S)) as world:
        study(world, given.output / "averagers.jsonl", *quick)
    launch.leave()


if __name__ == "__main__":
    main()
