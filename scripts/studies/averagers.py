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
from benchmarks.harness import records, table
from benchmarks.harness.figure import WIDTH, color, figure
from benchmarks.harness.records import Record
from training import launch
from training.log import count

from . import recipes, trained

FOLDER = records.ROOT / "docs" / "results"
STEPS = 300
PERIODS = (10, 30)
RATES = (0.003, 0.0015, 0.006)
"""Inner rates of every arm: those around the study of recipes' for AdamW."""
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
            yield from trained.if_left(arm, lr, trained.CHOICE_SEED, done)
        for seed in seeds:
            yield from trained.if_left(arm, trained.best_rate_of(arm, done), seed, done)
    for arm in arms():
        tried = list(rates)
        while (lr_beyond := trained.beyond(tried, trained.best_rate_of(arm, done), MOST_RATES)) is not None:
            tried.append(lr_beyond)
            yield from trained.if_left(arm, lr_beyond, trained.CHOICE_SEED, done)
        for seed in seeds:
            yield from trained.if_left(arm, trained.best_rate_of(arm, done), seed, done)


def one(world: launch.World, labels: dict[str, Any], quick: bool = False) -> dict[str, Any]:
    """The figures of one run, on the half of the held-out data that its seed is for."""
    arm = Arm(labels["averager"], labels["period"])
    given = command(arm, labels["lr"], labels["seed"], quick)
    return trained.train_on_half(world, given, labels["seed"])


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


def page(found: Sequence[Record]) -> str:
    """The page, from the records alone."""
    about, verdicts = found[0], rows(found)
    steps, ranks = about["steps"], about["ranks"]
    syncs = " or ".join(f"{steps // period}" for period in PERIODS)
    notes = (
        f"*M-AVG* has mu {MU:g}. *DiLoCo* has the outer rate 0.7 and Nesterov's momentum 0.9.",
        f"*DiLoCo, top-k* sends {DENSITY:.0%} of a rank's change and keeps the rest in a memory. Its outer step is "
        "SGD at rate 1 without momentum: SparseLoCo's scheme, without its decay.",
        f"There are only {syncs} outer steps in a run. An outer momentum of 0.9 takes about 10 to act in full, and the "
        f"memory about {1 / DENSITY:.0f} to send every place once.",
        "Bytes are what a rank sends in a step, counted at the transport, mean over the run. Dense's are a ring "
        "all-reduce's by formula.",
    )
    lines = [
        "# Averagers, measured",
        "",
        f"`scripts/accuracy --averagers`: {ranks} ranks over gloo on one machine. Each trains the small GPT of the "
        f"[study of recipes](recipes.md) by AdamW for {steps} steps, and the ranks average their models every H steps. "
        f"Each row is at the best of {len(about['rates'])} inner rates, chosen on one half of the held-out text. Where "
        "the lowest or the highest is best, the next ones beyond are tried when all rows are there. The loss is that of "
        f"the averaged model on the other half: mean and standard deviation over {len(about['seeds'])} seeds, and the "
        "share of the mean above dense training.",
        "",
    ]
    for note in notes:
        lines += table.paragraph(note, "- ")
    wanted = (len(about["rates"]) + len(about["seeds"])) * len(list(arms()))
    lacking = [name(arm) for arm in arms() if arm not in [row.arm for row in verdicts]]
    if lacking:
        lines += ["", f"Runs recorded: {len(found) - 1} of {wanted}. Not judged yet: {'; '.join(lacking)}."]
    if not verdicts:
        return table.page(lines)
    dense = verdicts[0] if verdicts[0].arm.averager == DENSE else None
    cells = [
        (
            row.arm.averager,
            f"{row.arm.period}",
            f"{row.lr:g}",
            trained.spread(row.losses),
            trained.share(row.above),
            count(row.bytes_sent_per_step),
            table.number(dense.bytes_sent_per_step / row.bytes_sent_per_step) if dense else "-",
        )
        for row in verdicts
    ]
    head = ("averager", "H", "rate", "loss", "above dense", "bytes a step", "fewer bytes")
    lines += [
        "",
        *table.markdown(head, cells),
        "",
        verdict(verdicts),
        "",
        "![loss against bytes](averagers.png)",
    ]
    return table.page(lines)


def name(arm: Arm) -> str:
    """What a sentence calls an arm."""
    return arm.averager if arm.averager == DENSE else f"{arm.averager} at H = {arm.period}"


def verdict(verdicts: Sequence[Row]) -> str:
    """Which rows are within the bar, the least loss at each H, and whose rate was not looked for far enough."""
    dense = next((row.losses for row in verdicts if row.arm.averager == DENSE), None)
    others = [row for row in verdicts if row.arm.averager != DENSE]
    text = trained.verdict(dense, {name(row.arm): row.losses for row in others})
    for period in PERIODS:
        known = [row for row in others if row.arm.period == period and row.above is not None]
        if known:
            best = min(known, key=lambda row: row.above or 0.0)
            text += f" The least loss at H = {period}: {best.arm.averager}, {trained.share(best.above)}."
    edge = [name(row.arm) for row in verdicts if row.at_edge]
    if edge:
        text += f" Best at the lowest or the highest rate tried, so perhaps better beyond: {'; '.join(edge)}."
    return text


def plot(found: Sequence[Record], file: Path) -> None:
    """Loss against bytes a step: a point for every seed, and a line through an averager's means."""
    verdicts = rows(found)
    markers = dict(zip(AVERAGERS, "Dos^v", strict=True))
    with figure(file, figsize=(WIDTH, 3.6)) as (_, axes):
        axis = axes[0, 0]
        for averager, marker in markers.items():
            mine = [row for row in verdicts if row.arm.averager == averager and None not in row.losses]
            if not mine:
                continue
            mine.sort(key=lambda row: row.bytes_sent_per_step)
            drawn = color("dense" if averager == DENSE else "topk" if "top-k" in averager else "averaging")
            sent = [row.bytes_sent_per_step for row in mine]
            means = [statistics.mean(loss for loss in row.losses if loss is not None) for row in mine]
            axis.plot(sent, means, marker=marker, color=drawn, label=averager)
            for row in mine:
                axis.plot([row.bytes_sent_per_step] * len(row.losses), row.losses, "_", color=drawn)
        axis.set(xscale="log", xlabel="bytes a rank sends a step", ylabel="loss on held-out text")
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def write(found: Sequence[Record], folder: Path) -> None:
    """The page, and the picture where an arm has been judged."""
    (folder / "averagers.md").write_text(page(found))
    if rows(found):
        plot(found, folder / "averagers.png")


def main() -> None:
    """Runs the study, or what is left of it, and writes page and picture."""
    p = argparse.ArgumentParser(prog="scripts/accuracy --averagers", description=__doc__)
    p.add_argument("--output", type=Path, default=FOLDER, help="folder (docs/results)")
    p.add_argument(
        "--quick", action="store_true", help="an MLP, one rate and seed: seconds, to see that it runs"
    )
    p.add_argument("--redraw", action="store_true", help="page and picture from the records, without a run")
    given = p.parse_args()
    if given.quick and given.output == FOLDER:
        p.error("--quick measures nothing worth keeping: give it another --output")
    torch.set_num_threads(1)
    quick: Any = ((0.003,), (0,), True) if given.quick else ()
    with launch.session(timeout_s=float(TIMEOUT_S)) as world:
        file = given.output / "averagers.jsonl"
        found = records.load(file) if given.redraw else study(world, file, *quick)
        if world.is_main:
            write(found, given.output)
            print(page(found), flush=True)
    launch.leave()


if __name__ == "__main__":
    main()
