"""The rules and tables of docs/recipes.md, from the records of the accuracy study and of the study of recipes.

What the rules say in words, such as which of two rows is the better one, tests/scripts/test_recipes_page.py checks.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence

from studies import accuracy, recipes, trained
from training import options

from ..harness.records import ROOT, Record, load
from ..harness.table import markdown, number, paragraph

HEAD = ("network", "scheme", "error feedback", "momentum", "points behind dense", "fewer bytes")

IMAGES = ("resnet20",)
"""Networks whose loss ends so near 0 that the accuracy says more."""


RECIPES = {
    "sgd": ((recipes.UNMASKED, 0.01), (recipes.MASKED_AT_ONCE, 0.01)),
    "nesterov": ((recipes.UNMASKED, 0.01), (recipes.MASKED_AT_ONCE, 0.01)),
    "adamw": ((recipes.LOWBIT, 1.0),),
}
"""What `for_optimizer` makes, by optimizer: variant and density."""
MASKED_LATE, AT_ONCE, IN_OPTIMIZER = recipes.MASKED, "no warm-up", "momentum in the optimizer"
TWICE, IN_RESIDUAL, FORGETS = "twice the warm-up", "warm-up, rate in the residual", "no error feedback"


@functools.cache
def records() -> list[Record]:
    """The records of the study of recipes."""
    return load(ROOT / "docs" / "results" / "recipes.jsonl")


@functools.cache
def found() -> dict[recipes.Arm, recipes.Row]:
    """The rows of the study of recipes."""
    return {row.arm: row for row in recipes.rows(records())}


def row(network: str, optimizer: str, variant: str, density: float = 0.01) -> recipes.Row:
    """One row of the study of recipes."""
    return found()[recipes.Arm(network, optimizer, variant, density)]


def dense(network: str, optimizer: str, variant: str = recipes.DENSE) -> recipes.Row:
    """The row of dense training."""
    return row(network, optimizer, variant, 1.0)


def loss(verdict: recipes.Row) -> float:
    """The mean loss over the seeds; infinite where one diverged."""
    return statistics.mean(known(verdict))


def known(verdict: recipes.Row) -> list[float]:
    """The losses by seed; infinite where one diverged."""
    return [float("inf") if one is None else one for one in verdict.losses]


def rate(network: str, optimizer: str, variant: str, density: float = 0.01) -> float:
    """A row's best rate over that of dense training."""
    return row(network, optimizer, variant, density).lr / dense(network, optimizer).lr


def fewer(network: str, optimizer: str, variant: str, density: float = 0.01) -> float:
    """How many times fewer bytes than dense training a step sends."""
    base = dense(network, optimizer).bytes_sent_per_step
    return base / row(network, optimizer, variant, density).bytes_sent_per_step


def warm_up(arm: recipes.Arm) -> float:
    """The share of the steps over which the density falls."""
    given = options.parse(recipes.command(arm, 1.0, 0))
    return given.warmup_steps / given.steps if given.steps else given.warmup / given.epochs


def numbers() -> list[str]:
    """What `for_optimizer` makes, by optimizer and network: its settings, loss and bytes."""
    lines = []
    pairs = recipes.pairs(list(found().values()))
    for network, optimizer in sorted(pairs, key=lambda pair: list(RECIPES).index(pair[1])):
        for variant, density in RECIPES[optimizer]:
            mine = row(network, optimizer, variant, density)
            share = warm_up(mine.arm)
            lines.append(
                (
                    optimizer,
                    network,
                    "every element in 4 bits" if variant == recipes.LOWBIT else f"{density:g}",
                    f"{share:.0%} of the steps" if share else "none",
                    "AdamW's" if optimizer == "adamw" else "0.9, in the memory",
                    f"{rate(network, optimizer, variant, density):g}",
                    trained.share(mine.above),
                    f"{round(mine.accuracy - dense(network, optimizer).accuracy, 3) + 0.0:+.1%}",
                    number(fewer(network, optimizer, variant, density)),
                )
            )
    head = ("optimizer", "network", "density", "warm-up", "momentum", "rate / dense's", "loss above dense's")
    return markdown((*head, "accuracy above dense's", "times fewer bytes"), lines, left=5)


def rules() -> list[str]:
    """The rules, a paragraph each, with their numbers."""

    def above(network: str, optimizer: str, variant: str, density: float = 0.01) -> str:
        return f"{row(network, optimizer, variant, density).above:.1%}"

    def reach(values: Sequence[float], form: str) -> str:
        return f"{min(values):{form}} to {max(values):{form}}"

    lstm, resnet = ("lstm", "sgd"), ("resnet20", "sgd")
    four = [(network, optimizer) for network in ("lstm", "resnet20") for optimizer in ("sgd", "nesterov")]
    at_once, warm = recipes.MASKED_AT_ONCE, recipes.UNMASKED
    clipped, bits, sparse = recipes.UNMASKED_CLIPPED, recipes.LOWBIT, recipes.SPARSE
    longest = reach([warm_up(row(*pair, warm).arm) for pair in four], ".0%")
    faster = reach([rate(*pair, at_once) for pair in four], "g")
    worst = max(row(*pair, at_once).above for pair in four)
    costs = [row("lstm", o, at_once, d).above for o in ("sgd", "nesterov") for d in (0.1, 0.001)]
    less = min(fewer(*pair, at_once) for pair in four)
    spread = statistics.stdev(known(dense("lstm", "adamw"))) / loss(dense("lstm", "adamw"))
    more = [row(*lstm, warm, d).bytes_sent_per_step for d in (0.001, 0.01)]
    texts = [
        f"**SGD at the dense run's rate.** Warm up over {longest} of the steps, at least a tenth in long runs: "
        "`for_optimizer(optimizer, density=0.01, warmup_steps=...)`. At density 0.01 that ended above dense's loss by "
        f"{above(*lstm, warm)} in the LSTM ({above('lstm', 'nesterov', warm)} with Nesterov's momentum and weight "
        "decay) and not below dense's accuracy in ResNet-20. With twice the warm-up the LSTM ended at "
        f"{above(*lstm, TWICE)}. At 0.1 it ended at {above(*lstm, warm, 0.1)}. 0.001 cost more, "
        f"{above(*lstm, warm, 0.001)}, and sent little less, {more[0] / more[1]:.0%} of the bytes, since the warm-up "
        "sends most of a short run's bytes.",
        "**SGD at a higher rate.** Without a warm-up, `for_optimizer(optimizer, density=0.01, warmup_steps=0)`, the "
        f"velocity is masked. Try {faster} times the dense run's best rate. At density 0.01 this ended at most "
        f"{worst:.1%} above dense's loss, in both networks and both forms of momentum, for {less:.0f} times fewer "
        "bytes. At the dense run's own rate it is worse than the first way. At 0.1 and 0.001 it cost "
        f"{reach(costs, '.1%')} in the LSTM.",
        "**Factor masking** takes most of the momentum away, the more the higher the density, and so allows the "
        f"higher rate. Without a warm-up the LSTM's best rate was {rate(*lstm, at_once):g} times dense's with masking, "
        f"and {rate(*lstm, AT_ONCE):g} times without, where its loss was {above(*lstm, AT_ONCE)} above. Behind a "
        f"warm-up masking was the worst of the three ways at density 0.01: {above(*lstm, MASKED_LATE)} above in the "
        "LSTM.",
        "**Momentum.** In one place, the memory. `for_optimizer` moves it, and a scheduler that cycles the momentum is "
        f"an error at its first step. In the optimizer it cost {above(*lstm, IN_OPTIMIZER)} in the LSTM, without a "
        f"warm-up, and in the memory, unmasked, {above(*lstm, AT_ONCE)}.",
        f"**Clipping.** Before the memory. It allowed {rate(*lstm, clipped) / rate(*lstm, warm):g} times the rate in "
        f"the LSTM and {rate(*resnet, clipped) / rate(*resnet, warm):g} times in ResNet-20, and lowered the loss of "
        "both. In the LSTM it lowered dense training's too: the clipped run ended "
        f"{above(*lstm, clipped)} above the clipped dense one. The bound is in [the how-to](howto.md#clipping).",
        "**The rate in the residual.** `for_optimizer(..., rescale_with_lr=True)` brought the LSTM from "
        f"{above(*lstm, warm)} to {above(*lstm, IN_RESIDUAL)} above dense, and ResNet-20 from "
        f"{above(*resnet, warm)} to {above(*resnet, IN_RESIDUAL)}, less than its seeds differ. It is measured behind a "
        "warm-up with a cosine schedule only, so it is not the default.",
        f"**AdamW.** 4 bits ended at {above('resnet20', 'adamw', bits, 1.0)} (ResNet-20), "
        f"{above('lstm', 'adamw', bits, 1.0)} (LSTM) and {above('gpt', 'adamw', bits, 1.0)} (GPT) beside dense's loss, "
        f"for {number(fewer('gpt', 'adamw', bits, 1.0))} times fewer bytes, at {rates_of_bits()} times dense's best rate. "
        f"The LSTM's seeds differ by {spread:.0%}. "
        f"Top-k at 0.01 cost {above('gpt', 'adamw', 'top-k')} in the GPT, {above('gpt', 'adamw', sparse)} behind a "
        f"warm-up, and at 0.1 behind one {above('gpt', 'adamw', sparse, 0.1)}.",
        f"**Error feedback.** Without it, and without a warm-up, the LSTM lost {above(*lstm, FORGETS)} at density 0.01 "
        f"under SGD and {above(*lstm, FORGETS, 0.001)} at 0.001. With it, masked, it lost "
        f"{above(*lstm, at_once, 0.001)} at 0.001. The GPT under AdamW lost {above('gpt', 'adamw', FORGETS)} and "
        f"{above('gpt', 'adamw', FORGETS, 0.001)}: at 0.01 error feedback did not help it.",
    ]
    return [line for text in texts for line in (*paragraph(text), "")][:-1]


def rates_of_bits() -> str:
    """The best rates of 4 bits over dense's, of the three networks in their order."""
    rates = [f"{rate(network, 'adamw', recipes.LOWBIT, 1.0):g}" for network in ("resnet20", "lstm", "gpt")]
    return f"{', '.join(rates[:-1])} and {rates[-1]}"


def digits() -> list[str]:
    """Test accuracy behind dense training, and the bytes of a step, of every row of the study."""
    _, runs = accuracy.saved(ROOT / "docs" / "results" / "accuracy.jsonl")
    summary = accuracy.summarise(runs)
    base = {row["model"]: row["bytes_sent_per_step"] for row in summary if row["scheme"] == "dense"}
    lines = [
        (
            row["model"],
            accuracy.NAMES[row["scheme"]],
            "yes" if row["error_feedback"] else "no",
            f"{row['momentum']:g}",
            f"{row['behind_dense']:+.2f}",
            f"{base[row['model']] / row['bytes_sent_per_step']:.0f} times",
        )
        for row in summary
        if row["scheme"] != "dense"
    ]
    return markdown(HEAD, lines)


def momentum() -> list[str]:
    """SGD's rows by network: the share above dense, for images the accuracy too."""
    return _grid("sgd", "nesterov")


def adamw() -> list[str]:
    """AdamW's rows by network: the share above dense, for images the accuracy too."""
    return _grid("adamw")


def _grid(*optimizers: str) -> list[str]:
    """A line a variant and density, a column a network and optimizer; dense's line has the losses themselves."""
    chosen = [verdict for verdict in found().values() if verdict.arm.optimizer in optimizers]
    columns = recipes.pairs(chosen)
    by_line: dict[tuple[str, float], dict[tuple[str, str], str]] = {}
    for verdict in chosen:
        arm, is_dense = verdict.arm, verdict.arm.variant == recipes.DENSE
        cell = trained.spread(verdict.losses) if is_dense else trained.share(verdict.above)
        cell = "diverges" if cell == "-" else cell
        if arm.network in IMAGES:
            cell += f"; {verdict.accuracy:.1%}"
        by_line.setdefault((arm.variant, arm.density), {})[arm.network, arm.optimizer] = cell
    head = ("variant", "density", *(", ".join(column[: len(optimizers)]) for column in columns))
    return markdown(
        head,
        [
            (variant, f"{density:g}", *(line.get(column, "") for column in columns))
            for (variant, density), line in by_line.items()
        ],
    )


TABLES = {"numbers": numbers, "rules": rules, "digits": digits, "momentum": momentum, "adamw": adamw}
