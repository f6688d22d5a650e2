"""The measured tables of docs/recipes.md, from the records of the accuracy study and of the study of recipes."""

from __future__ import annotations

from studies import accuracy, recipes, trained

from ..harness.records import ROOT, load
from ..harness.table import markdown

HEAD = ("network", "scheme", "error feedback", "momentum", "points behind dense", "fewer bytes")

IMAGES = ("resnet20",)
"""Networks whose loss ends so near 0 that the accuracy says more."""


def digits() -> list[str]:
    """Test accuracy behind dense training, and the bytes of a step, of every row of the study."""
    _, runs = accuracy.saved(ROOT / "docs" / "results" / "accuracy.jsonl")
    found = accuracy.summarise(runs)
    dense = {row["model"]: row["bytes_sent_per_step"] for row in found if row["scheme"] == "dense"}
    lines = [
        (
            row["model"],
            accuracy.NAMES[row["scheme"]],
            "yes" if row["error_feedback"] else "no",
            f"{row['momentum']:g}",
            f"{row['behind_dense']:+.2f}",
            f"{dense[row['model']] / row['bytes_sent_per_step']:.0f} times",
        )
        for row in found
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
    found = recipes.rows(load(ROOT / "docs" / "results" / "recipes.jsonl"))
    found = [row for row in found if row.arm.optimizer in optimizers]
    columns = recipes.pairs(found)
    by_line: dict[tuple[str, float], dict[tuple[str, str], str]] = {}
    for row in found:
        dense = row.arm.variant == recipes.DENSE
        cell = trained.spread(row.losses) if dense else trained.share(row.above)
        cell = "diverges" if cell == "-" else cell
        if row.arm.network in IMAGES:
            cell += f"; {row.accuracy:.1%}"
        by_line.setdefault((row.arm.variant, row.arm.density), {})[row.arm.network, row.arm.optimizer] = cell
    head = ("variant", "density", *(", ".join(column[: len(optimizers)]) for column in columns))
    return markdown(
        head,
        [
            (variant, f"{density:g}", *(line.get(column, "") for column in columns))
            for (variant, density), line in by_line.items()
        ],
    )


TABLES = {"digits": digits, "momentum": momentum, "adamw": adamw}
