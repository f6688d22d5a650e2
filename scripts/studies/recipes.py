"""The study of recipes on 4 ranks: which settings train with which optimizer and network (run by scripts/accuracy --recipes).

Every arm trains at four learning rates, is judged at its best, and that on three other seeds. The rate is chosen on
one half of the held-out data, and the verdict is the loss on the other half. Each run is a record in recipes.jsonl as
soon as it ends. A study that is started again goes on behind the last record.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from benchmarks.harness import records
from training import launch, tasks
from training.log import count, table

from . import trained

ROOT = Path(__file__).resolve().parent.parent.parent
BAR = 0.02
"""An arm is as good as dense training when its loss is at most this share above."""
RATES = (0.25, 0.5, 1.0, 2.0)
"""Multiples of the network's rate for an optimizer, from which an arm takes its best."""
CHOICE_SEED, SEEDS = 100, (0, 1, 2)
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
        warmup: epochs of the density's warm-up.
    """

    given: Sequence[Any]
    rates: dict[str, float]
    warmup: int


NETWORKS = {
    "resnet20": Network(
        ("--task", "digits", "--model", "resnet20", "--batch-size", 32, "--epochs", 8),
        {"sgd": 0.1, "nesterov": 0.1, "adamw": 0.003},
        2,
    ),
    "lstm": Network(
        ("--model", "lstm", "--batch-size", 20, "--epochs", 3),
        {"sgd": 2.0, "nesterov": 2.0, "adamw": 0.005},
        1,
    ),
    "gpt": Network(
        ("--model", "gpt", "--text-size", 400_000, "--batch-size", 4, "--steps", 300, "--sample", 0),
        {"adamw": 0.003},
        1,
    ),
}
QUICK = Network(("--model", "mlp", "--hidden", 8, "--batch-size", 120, "--epochs", 1), {"sgd": 0.1}, 1)
OPTIMIZERS = {
    "sgd": ("--optimizer", "sgd", "--momentum", 0.9),
    "nesterov": ("--optimizer", "sgd", "--momentum", 0.9, "--nesterov", "--weight-decay", 5e-4),
    "adamw": ("--optimizer", "adamw", "--weight-decay", 0.1),
}
DENSE, RECIPE = "dense", "recipe"
# Variant: options behind the optimizer's, and whether the density is warmed up.
SGD: dict[str, tuple[Sequence[Any], float]] = {
    DENSE: (("--scheme", "dense"), 0),
    RECIPE: (("--factor-masking",), 1),
    "momentum in the memory": ((), 0),
    "momentum in the optimizer": (("--momentum-in", "optimizer"), 0),
    "masked, no warm-up": (("--factor-masking",), 0),
    "recipe, twice the warm-up": (("--factor-masking",), 2),
    "recipe, clipped": (("--factor-masking", "--clip-norm", 1), 1),
    "recipe, rate in the residual": (("--factor-masking", "--rescale-with-lr"), 1),
    "no error feedback": (("--no-error-feedback",), 0),
}
NESTEROV = {name: SGD[name] for name in (DENSE, RECIPE)}
ADAMW: dict[str, tuple[Sequence[Any], float]] = {
    DENSE: (("--scheme", "dense"), 0),
    RECIPE: ((), 1),
    "no warm-up": ((), 0),
    "no error feedback": (("--no-error-feedback",), 0),
}
VARIANTS = {"sgd": SGD, "nesterov": NESTEROV, "adamw": ADAMW}


def arms(networks: Sequence[str]) -> Iterator[Arm]:
    """All rows: the recipe at every density, without feedback also at the smallest, the others at 0.01."""
    for network in networks:
        for optimizer in network_of(network).rates:
            for variant in VARIANTS[optimizer]:
                densities: Sequence[float] = (0.01,)
                if variant == DENSE:
                    densities = (1.0,)
                elif variant == RECIPE:
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
    if arm.variant != DENSE:
        given += ["--density", arm.density]
        if warmups and arm.density < 0.25:
            given += ["--warmup", int(warmups * network.warmup)]
    return [str(part) for part in given]


def runs(
    chosen: Sequence[Arm], rates: Sequence[float], seeds: Sequence[int], done: list[records.Record]
) -> Iterator[dict[str, Any]]:
    """What is left to run, as labels of records. `done` may grow meanwhile: an arm's best rate is read from it."""
    for arm in chosen:
        base = network_of(arm.network).rates[arm.optimizer]
        for part, seed in [
            *((base * rate, CHOICE_SEED) for rate in rates),
            *((None, seed) for seed in seeds),
        ]:
            lr = best_rate(arm, done) if part is None else part
            labels = {**arm._asdict(), "lr": records.rounded(lr), "seed": seed}
            if not records.select(done, **labels):
                yield labels


def best_rate(arm: Arm, done: Sequence[records.Record]) -> float:
    """The rate with the least loss on the data of the choice."""
    return trained.best_rate(records.select(done, **arm._asdict(), seed=CHOICE_SEED))


def one(world: launch.World, labels: dict[str, Any]) -> dict[str, Any]:
    """The figures of one run, on the half of the held-out data that its seed is for."""
    arm = Arm(*(labels[name] for name in Arm._fields))
    second = labels["seed"] != CHOICE_SEED
    given = command(arm, labels["lr"], labels["seed"])
    return trained.train(world, given, lambda run: keep_half(run.task, second))


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


def study(
    world: launch.World,
    file: Path,
    networks: Sequence[str],
    rates: Sequence[float] = RATES,
    seeds: Sequence[int] = SEEDS,
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
    """One arm's verdict. `above`: share by which its mean loss is above dense's; None: it did not converge."""

    arm: Arm
    lr: float
    losses: list[float | None]
    above: float | None
    bytes_sent_per_step: float


def rows(found: Sequence[records.Record]) -> list[Row]:
    """The verdicts of all arms that ran on every seed, in the order of the records."""
    about, *ran = found
    by_arm: dict[Arm, list[records.Record]] = {}
    for record in ran:
        if record["seed"] != CHOICE_SEED:
            by_arm.setdefault(Arm(*(record[name] for name in Arm._fields)), []).append(record)
    means: dict[Arm, float | None] = {}
    result = []
    for arm, of_arm in by_arm.items():
        if len(of_arm) < len(about["seeds"]):
            continue
        losses = [record["loss"] for record in of_arm]
        known = [loss for loss in losses if loss is not None]
        means[arm] = statistics.mean(known) if len(known) == len(losses) else None
        dense, mine = means.get(Arm(arm.network, arm.optimizer, DENSE, 1.0)), means[arm]
        above = None if dense is None or mine is None else mine / dense - 1.0
        sent = statistics.mean(record["bytes_sent_per_step"] for record in of_arm)
        result.append(Row(arm, of_arm[0]["lr"], losses, above, sent))
    return result


def page(found: Sequence[records.Record]) -> str:
    """The page, from the records alone."""
    about, verdicts = found[0], rows(found)
    parts = [
        "# Recipes, measured",
        "",
        f"`scripts/accuracy --recipes`: {about['ranks']} ranks over gloo on one machine. Each row at the best of "
        f"{len(about['rates'])} learning rates, chosen on one half of the held-out data; loss on the other half, mean "
        f"over {len(about['seeds'])} seeds, and its share above dense training with the same optimizer. *Recipe* is "
        "what `for_optimizer` makes: momentum in the memory, masked, with a warm-up; under AdamW the warm-up alone.",
    ]
    for network, optimizer in dict.fromkeys((row.arm.network, row.arm.optimizer) for row in verdicts):
        lines = [
            (
                row.arm.variant,
                f"{row.arm.density:g}",
                f"{row.lr:g}",
                _spread(row.losses),
                "-" if row.above is None else f"{row.above:+.1%}",
                count(row.bytes_sent_per_step),
            )
            for row in verdicts
            if (row.arm.network, row.arm.optimizer) == (network, optimizer)
        ]
        heads = ("variant", "density", "rate", "loss", "above dense", "bytes a step")
        parts += [
            "",
            f"## {network}, {optimizer}",
            "",
            table(heads, lines),
            "",
            verdict(verdicts, network, optimizer),
        ]
    return "\n".join(parts) + "\n"


def verdict(verdicts: Sequence[Row], network: str, optimizer: str) -> str:
    """Which rows are within the bar."""
    mine = [
        r
        for r in verdicts
        if (r.arm.network, r.arm.optimizer) == (network, optimizer) and r.arm.variant != DENSE
    ]
    within = [f"{r.arm.variant} at {r.arm.density:g}" for r in mine if r.above is not None and r.above <= BAR]
    return f"Within {BAR:.0%} of dense's loss: {'; '.join(within) or 'none'}."


def _spread(losses: Sequence[float | None]) -> str:
    known = [loss for loss in losses if loss is not None]
    if len(known) < len(losses):
        return "diverges"
    return f"{statistics.mean(known):.3f} ± {statistics.stdev(known) if len(known) > 1 else 0.0:.3f}"


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
