"""The measured tables of README.md."""

from __future__ import annotations

from functools import partial

from gpu import page

from ..harness import names
from ..harness.records import load
from ..harness.table import markdown, ms, number
from ..network import step

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


TABLES = {
    "steps": steps,
    "gpu": partial(page.state, figures="docs/performance.md"),
}
