"""The measured tables of README.md."""

from __future__ import annotations

from functools import partial

from gpu import page
from training import demo

from ..harness.records import ROOT, load, one
from ..harness.table import markdown, ms, number, paragraph
from ..network import accuracy, auto, step
from . import names

_SCHEMES = {
    "dense": "dense all-reduce",
    "fp16": "fp16 hook",
    "powersgd1": "PowerSGD rank 1",
    "topk": "**top-k**",
    "gtopk": "**gTop-k**",
}


def steps() -> list[str]:
    """ResNet-50 on 4 ranks: milliseconds a step, and times faster than dense."""
    starts = step.starts(load("network"))
    rows = []
    for scheme, name in _SCHEMES.items():
        cells = [name]
        for network in ("1gbit", "100mbit"):
            schemes = starts["resnet50", 4, network]
            record = schemes[scheme]
            faster = number(step.times_faster(record, schemes, "dense"))
            cells += [ms(record["step_s"]), f"**{faster}**" if "**" in name else faster]
        rows.append(cells)
    head = ["4 ranks"]
    for network in ("1gbit", "100mbit"):
        head += [f"{names.NETWORKS[network]}, ms", "times faster"]
    return markdown(head, rows)


def others() -> list[str]:
    """Time to accuracy, and a link without a limit."""
    lstm = {r["scheme"]: r for r in load("accuracy") if r["job"] == "lstm"}
    reached = [accuracy.seconds_to(lstm[scheme], 3.0) for scheme in ("gtopk", "powersgd2", "fp16")]
    gtopk, powersgd, fp16 = (f"{seconds:.0f} s" for seconds in reached if seconds is not None)
    found = load("auto")
    over = [
        number(auto.over_dense(one(found, scheme="auto", model="resnet50", ranks=ranks), found))
        for ranks in (2, 4)
    ]
    return [
        *paragraph(
            f"Time to accuracy: a 2-layer LSTM across 100 Mbit/s reaches training loss 3 in {gtopk} with "
            f"gTop-k, in {powersgd} with PowerSGD rank 2, in {fp16} with fp16.",
            "- ",
        ),
        *paragraph(
            "A link without a limit, gloo on a CPU: a step of ResNet-50 under `SparseState.auto` takes "
            f"{over[0]} (2 ranks) and {over[1]} (4 ranks) of dense's.",
            "- ",
        ),
    ]


def demonstration() -> list[str]:
    """What `scripts/demo` prints."""
    return markdown(demo.HEAD, demo.rows(load(ROOT / "docs" / "results" / "demo.jsonl")))


TABLES = {
    "demo": demonstration,
    "steps": steps,
    "others": others,
    "gpu": partial(page.state, figures="docs/performance.md"),
}
