"""The study of recipes on 4 ranks: which settings train with which optimizer and network (run by scripts/accuracy --recipes).

Every arm trains at four learning rates, is judged at its best, and that on three other seeds. The rate is chosen on
one half of the held-out data, and the verdict is the loss on the other half. Each run is a record in recipes.jsonl as
soon as it ends. A study that is started again goes on behind the last record.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from benchmarks.harness import records, table
from training import launch
from training.log import count

from . import trained

ROOT = Path(__file__).resolve().parent.parent.parent
RATES = (0.25, 0.5, 1.0, 2.0)
"""Multiples of the network's rate for an optimizer, from which an arm takes its best."""
MOST_RATES = 6
DENSITIES = (0.1, 0.01, 0.001)


class Arm(NamedTuple):
    """What is compared: a row of the table.

    Attributes:
        network: a name in NETWORKS.
        optimizer: a name in OPTIMIZERS.
        variant: a name in the optimizer's variants.
        density: k/n; 1 for dense.
    """

    network: str
    optimizer: str
    variant: str
    density: float


class Network(NamedTuple):
    """A network and its data.

    Attributes:
        given: options of train.py.
        rates: by optimizer, the learning rate around which the best is looked for. Others are not trained.
        warmup: how long the density's warm-up is, in the unit of the option.
        unit: option of the warm-up: epochs or steps.
    """

    given: Sequence[Any]
    rates: dict[str, float]
    warmup: int
    unit: str = "--warmup"


NETWORKS = {
    "resnet20": Network(
        ("--task", "digits", "--model", "resnet20", "--batch-size", 32, "--epochs", 8),
        {"sgd": 0.1, "nesterov": 0.1, "adamw": 0.003},
        2,
    ),
    "lstm": Network(
        ("--model", "lstm", "--hidden", 64, "--text-size", 150_000, "--batch-size", 10, "--epochs", 3),
        {"sgd": 2.0, "nesterov": 2.0, "adamw": 0.005},
        1,
    ),
    "gpt": Network(
        ("--model", "gpt", "--text-size", 400_000, "--batch-size", 2, "--steps", 300, "--sample", 0),
        {"adamw": 0.003},
        100,
        "--warmup-steps",
    ),
}
QUICK = Network(("--model", "mlp", "--hidden", 8, "--batch-size", 120, "--epochs", 1), {"sgd": 0.1}, 1)
OPTIMIZERS = {
    "sgd": ("--optimizer", "sgd", "--momentum", 0.9),
    "nesterov": ("--optimizer", "sgd", "--momentum", 0.9, "--nesterov", "--weight-decay", 5e-4),
    "adamw": ("--optimizer", "adamw", "--weight-decay", 0.1),
}
DENSE, CLIPPED, SPARSE, LOWBIT = "dense", "dense, clipped", "top-k, warm-up", "4 bits"
UNMASKED_CLIPPED = "warm-up, clipped"
UNMASKED, MASKED, MASKED_AT_ONCE = "warm-up", "masked, warm-up", "masked"
# Variant: options behind the optimizer's, and how many warm-ups of the density.
SGD: dict[str, tuple[Sequence[Any], int]] = {
    DENSE: (("--scheme", "dense"), 0),
    CLIPPED: (("--scheme", "dense", "--clip-norm", 1), 0),
    MASKED: (("--factor-masking",), 1),
    MASKED_AT_ONCE: (("--factor-masking",), 0),
    UNMASKED: ((), 1),
    "no warm-up": ((), 0),
    "momentum in the optimizer": (("--momentum-in", "optimizer"), 0),
    "twice the warm-up": ((), 2),
    UNMASKED_CLIPPED: (("--clip-norm", 1), 1),
    "warm-up, rate in the residual": (("--rescale-with-lr",), 1),
    "no error feedback": (("--no-error-feedback",), 0),
}
NESTEROV = {name: SGD[name] for name in (DENSE, UNMASKED, MASKED_AT_ONCE)}
ADAMW: dict[str, tuple[Sequence[Any], int]] = {
    DENSE: (("--scheme", "dense"), 0),
    LOWBIT: (("--scheme", "lowbit"), 0),
    SPARSE: ((), 1),
    "top-k": ((), 0),
    "no error feedback": (("--no-error-feedback",), 0),
}
VARIANTS = {"sgd": SGD, "nesterov": NESTEROV, "adamw": ADAMW}


def arms(networks: Sequence[str]) -> Iterator[Arm]:
    """All rows: the warm-ups and the masked ones at every density, the others at 0.01, without feedback at 0.001 too."""
    for network in networks:
        for optimizer in network_of(network).rates:
            for variant in VARIANTS[optimizer]:
                densities: Sequence[float] = (0.01,)
                if variant in (DENSE, CLIPPED, LOWBIT):
                    densities = (1.0,)
                elif variant in (UNMASKED, SPARSE, MASKED, MASKED_AT_ONCE):
                    densities = DENSITIES
                elif variant == "no error feedback":
                    densities = (0.01, 0.001)
                for density in densities:
                    yield Arm(network, optimizer, variant, density)


def network_of(name: str) -> Network:
    """The network of a name; `quick` is an MLP of 8 hidden units, one epoch."""
    return QUICK if name == "quick" else NETWORKS[name]


def command(arm: Arm, lr: float, seed: int) -> list[str]:
    """The options of train.py for one run."""
    network, (more, warmups) = network_of(arm.network), VARIANTS[arm.optimizer][arm.variant]
    given = [*network.given, *OPTIMIZERS[arm.optimizer], *more, "--lr", lr, "--seed", seed, "--quiet"]
    if arm.density < 1.0:
        given += ["--density", arm.density]
        if warmups and arm.density < 0.25:
            given += [network.unit, warmups * network.warmup]
    return [str(part) for part in given]


def runs(
    chosen: Sequence[Arm], rates: Sequence[float], seeds: Sequence[int], done: list[records.Record]
) -> Iterator[dict[str, Any]]:
    """What is left to run, as labels of records. `done` may grow meanwhile: an arm's best rate is read from it.

    An arm whose best rate is the lowest or the highest also gets the next one beyond, at most MOST_RATES in all.
    """
    for arm in chosen:
        base = network_of(arm.network).rates[arm.optimizer]
        tried = [records.rounded(base * rate) for rate in sorted(rates)]
        for lr in tried:
            yield from trained.if_left(arm, lr, trained.CHOICE_SEED, done)
        while (lr := trained.beyond(tried, trained.best_rate_of(arm, done), MOST_RATES)) is not None:
            tried.append(lr)
            yield from trained.if_left(arm, lr, trained.CHOICE_SEED, done)
        for seed in seeds:
            yield from trained.if_left(arm, trained.best_rate_of(arm, done), seed, done)


def one(world: launch.World, labels: dict[str, Any]) -> dict[str, Any]:
    """The figures of one run, on the half of the held-out data that its seed is for."""
    arm = Arm(*(labels[name] for name in Arm._fields))
    given = command(arm, labels["lr"], labels["seed"])
    return trained.train_on_half(world, given, labels["seed"])


def study(
    world: launch.World,
    file: Path,
    networks: Sequence[str],
    rates: Sequence[float] = RATES,
    seeds: Sequence[int] = trained.SEEDS,
) -> list[records.Record]:
    """Runs what the file lacks and writes each record as it comes. All ranks call it."""
    chosen = list(arms(networks))
    return trained.study(
        world,
        file,
        {"ranks": world.size, "rates": list(rates), "seeds": list(seeds)},
        lambda done: runs(chosen, rates, seeds, done),
        lambda labels: one(world, labels),
    )


class Row(NamedTuple):
    """One arm's verdict.

    Attributes:
        arm: what was trained.
        lr: its best rate.
        losses: of the verdict's seeds.
        baseline: the losses of dense training with the same optimizer, clipped where the arm is; None: not run.
        above: share by which its mean loss is above the baseline's; None: it did not converge.
        accuracy: mean share of the held-out examples, or of the tokens of a text, that it predicts.
        bytes_sent_per_step: mean over the run, of one rank.
    """

    arm: Arm
    lr: float
    losses: trained.Losses
    baseline: trained.Losses | None
    above: float | None
    accuracy: float
    bytes_sent_per_step: float


def rows(found: Sequence[records.Record]) -> list[Row]:
    """The verdicts of all arms that ran on every seed, in the order of the study."""
    about, *ran = found
    by_arm: dict[Arm, list[records.Record]] = {}
    for record in ran:
        if record["seed"] != trained.CHOICE_SEED:
            by_arm.setdefault(Arm(*(record[name] for name in Arm._fields)), []).append(record)
    dense: dict[tuple[str, str, str], trained.Losses] = {}
    result = []
    for arm in arms(list(dict.fromkeys(arm.network for arm in by_arm))):
        best = trained.best_rate_of(arm, ran) if arm in by_arm else None
        of_arm = [record for record in by_arm.get(arm, []) if record["lr"] == best]
        if len(of_arm) < len(about["seeds"]):
            continue
        losses = [record["loss"] for record in of_arm]
        if arm.variant in (DENSE, CLIPPED):
            dense[arm.network, arm.optimizer, arm.variant] = losses
        its_dense = CLIPPED if arm.variant == UNMASKED_CLIPPED else DENSE
        baseline = dense.get((arm.network, arm.optimizer, its_dense))
        accuracy, sent = (
            statistics.mean(record[figure] for record in of_arm)
            for figure in ("accuracy", "bytes_sent_per_step")
        )
        above = trained.above(losses, baseline)
        result.append(Row(arm, of_arm[0]["lr"], losses, baseline, above, accuracy, sent))
    return result


def page(found: Sequence[records.Record]) -> str:
    """The page, from the records alone."""
    about, verdicts = found[0], rows(found)
    lines = [
        "# Recipes, measured",
        "",
        f"`scripts/accuracy --recipes`: {about['ranks']} ranks over gloo on one machine. Each row is at the best of "
        f"{len(about['rates'])} learning rates, and of the next ones beyond where the lowest or the highest is best, "
        "chosen on one half of the held-out data. The loss is on the other half: "
        f"mean and standard deviation over {len(about['seeds'])} seeds, and the share of the mean above dense training "
        "with the same optimizer, clipped where the row is. Accuracy is the share of examples, or of a text's "
        "characters, that are predicted. Under SGD the momentum is in the memory unless a row says otherwise. "
        "`for_optimizer` makes *warm-up* for SGD, *masked* where it is given no warm-up, and *4 bits* for AdamW.",
    ]
    for network, optimizer in pairs(verdicts):
        mine = [row for row in verdicts if (row.arm.network, row.arm.optimizer) == (network, optimizer)]
        cells = [
            (
                row.arm.variant,
                f"{row.arm.density:g}",
                f"{row.lr:g}",
                trained.spread(row.losses),
                trained.share(row.above),
                f"{row.accuracy:.2%}",
                count(row.bytes_sent_per_step),
            )
            for row in mine
        ]
        lines += ["", f"## {network}, {optimizer}", ""]
        head = ("variant", "density", "rate", "loss", "above dense", "accuracy", "bytes a step")
        lines += table.markdown(head, cells)
        lines += ["", verdict(mine)]
    return table.page(lines)


def pairs(verdicts: Sequence[Row]) -> list[tuple[str, str]]:
    """The networks and their optimizers, in the order of the rows."""
    return list(dict.fromkeys((row.arm.network, row.arm.optimizer) for row in verdicts))


def verdict(mine: Sequence[Row]) -> str:
    """Which rows without clipping are within the bar, and which not by more than the seeds differ; then the clipped."""
    plain = [row for row in mine if row.arm.variant not in (DENSE, CLIPPED, UNMASKED_CLIPPED)]
    dense = next((row.losses for row in mine if row.arm.variant == DENSE), None)
    text = trained.verdict(dense, {f"{row.arm.variant} at {row.arm.density:g}": row.losses for row in plain})
    for row in mine:
        if row.arm.variant == UNMASKED_CLIPPED:
            text += f" Clipped behind a warm-up, against dense training that is clipped: {trained.share(row.above)}."
    return text


def main() -> None:
    """Runs the study, or what is left of it, and writes the page."""
    p = argparse.ArgumentParser(prog="scripts/accuracy --recipes", description=__doc__)
    p.add_argument("--networks", nargs="+", choices=tuple(NETWORKS), default=list(NETWORKS))
    p.add_argument("--output", type=Path, default=ROOT / "docs" / "results", help="folder (docs/results)")
    p.add_argument(
        "--quick", action="store_true", help="an MLP, one rate and seed: seconds, to see that it runs"
    )
    given = p.parse_args()
    if given.quick and given.output == ROOT / "docs" / "results":
        p.error("--quick measures nothing worth keeping: give it another --output")
    torch.set_num_threads(1)
    file = given.output / "recipes.jsonl"
    with launch.session() as world:
        quick: Any = (("quick",), (1.0,), (0,)) if given.quick else (given.networks,)
        found = study(world, file, *quick)
        if world.is_main:
            (given.output / "recipes.md").write_text(page(found))
            print(page(found), flush=True)
    launch.leave()


if __name__ == "__main__":
    main()
