"""The measured table of docs/recipes.md, from the records of the accuracy study."""

from __future__ import annotations

from studies import accuracy

from ..harness.records import ROOT
from ..harness.table import markdown

HEAD = ("network", "scheme", "error feedback", "momentum", "points behind dense", "fewer bytes")


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


TABLES = {"digits": digits}
