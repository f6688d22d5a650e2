"""The measured tables of docs/averaging.md: the study of averagers, and `scripts/bench diloco`."""

from __future__ import annotations

from studies import averagers, trained

from ..harness.records import ROOT, load, measured
from ..harness.table import markdown, number, paragraph
from ..network import diloco

HEAD = (
    "",
    "GPT: final loss",
    "GPT: ms a sync",
    "ResNet-50's parameters: ms a sync",
    "MB a sync",
    "statements",
)


def which() -> list[str]:
    """A row for each averager and period of the study: its loss above dense training's, and fewer bytes."""
    rows = averagers.rows(load(ROOT / "docs" / "results" / "averagers.jsonl"))
    dense = next(row for row in rows if row.arm.averager == averagers.DENSE)
    lines = [
        (
            row.arm.averager,
            str(row.arm.period),
            number(row.lr / dense.lr),
            trained.share(row.above),
            number(dense.bytes_sent_per_step / row.bytes_sent_per_step),
        )
        for row in rows
        if row is not dense
    ]
    return markdown(("averager", "H", "rate / dense's", "loss above dense", "fewer bytes"), lines)


def torchft() -> list[str]:
    """A row for each library and wire: loss of the small GPT, time and bytes of a synchronisation."""
    records = measured(load("diloco"))
    rows = {(r["library"], r["model"]): r for r in records}
    lines = []
    for library in diloco.LIBRARIES:
        gpt, large = rows[library, "gpt"], rows[library, "resnet50"]
        times = (number(gpt["sync_s"] * 1e3), number(large["sync_s"] * 1e3))
        lines.append(
            (library, f"{gpt['loss']:.3f}", *times, number(large["sync_bytes"] * 1e-6), str(gpt["lines"]))
        )
    return markdown(HEAD, lines)


def float64() -> list[str]:
    """How far apart both libraries' parameters are in float64."""
    record = next(r for r in measured(load("diloco")) if r["library"] == diloco.BOTH)
    return paragraph(
        f"In float64 the parameters of both differ by at most {record['difference']:.0e} after {record['steps']} "
        "steps of the GPT."
    )


TABLES = {"which": which, "torchft": torchft, "float64": float64}
