"""The tables of docs/slow-links.md, from the records of the study of slow links and of `scripts/bench lowbit`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from studies import slow_links
from studies.slow_links import METHODS, Row

from ..harness import names
from ..harness.records import load, one, select
from ..harness.table import markdown, number, paragraph
from ..network import exchange, step
from ..network.schemes import LOW_BIT
from . import time_to_loss


def _rows() -> dict[tuple[str, int], Row]:
    return {(row.method, row.ranks): row for row in slow_links.rows(load("slow-links"))}


def _share(mine: float, other: float) -> str:
    return f"{mine / other - 1.0:+.1%}"


def state() -> list[str]:
    """How much of the study has run."""
    rows = list(_rows().values())
    ran, wanted = sum(row.runs for row in rows), sum(row.wanted for row in rows)
    none = [_name(row) for row in rows if row.runs == 0]
    text = f"Runs recorded: {ran} of {wanted}."
    if ran < wanted:
        text += " A row that is not whole has one seed, or fewer rates to be the best of, and is no verdict."
    if none:
        text += f" Without any run: {'; '.join(none)}."
    return paragraph(text)


def _name(row: Row) -> str:
    return METHODS[row.method].text + ("" if row.ranks == 4 else f", {row.ranks} ranks")


def methods() -> list[str]:
    """Loss, its share above both dense runs, and bytes, of every method that has a run."""
    rows = _rows()
    dense = [rows["dense adamw", 4], rows["dense muon", 4]]
    lines = []
    for row in rows.values():
        if row.runs == 0:
            continue
        cells = [_name(row), f"{row.runs} of {row.wanted}", f"{row.lr:g}"]
        cells.append("diverges" if row.loss is None else f"{row.loss:.3f}")
        for base in dense:
            known = row.loss is not None and base.loss is not None and row.method != base.method
            cells.append(_share(row.loss, base.loss) if known else "")
        same = rows["dense adamw", 4].bytes_sent_per_step if row.ranks == 4 else 0.0
        cells.append(number(same / row.bytes_sent_per_step) if same else "")
        lines.append(cells)
    head = ("method", "runs", "rate", "loss", "above dense AdamW", "above dense Muon", "fewer bytes")
    return markdown(head, lines)


class Aim(NamedTuple):
    """What the study asks of a method: a bound on its loss beside another's, and on its bytes beside dense.

    Attributes:
        method: a name in METHODS.
        base: the method it is compared with.
        most: the largest share above the base's loss.
        times: how many times fewer bytes than dense, at least.
    """

    method: str
    base: str
    most: float
    times: float


AIMS = (
    Aim("muon k4", "dense adamw", -0.03, 100.0),
    Aim("muon k4", "dense muon", 0.035, 100.0),
    Aim("muon k14", "dense muon", 0.05, 400.0),
    Aim("lowbit4 adamw", "dense adamw", 0.005, 7.5),
    Aim("adamw k4", "dense adamw", 0.077, 100.0),
)


def aims() -> list[str]:
    """Each aim, and whether it is met. Nothing is said of methods whose runs are not all there."""
    rows, lines = _rows(), []
    for aim in AIMS:
        mine, base = rows[aim.method, 4], rows[aim.base, 4]
        bound = f"{aim.most:+.1%} of {METHODS[aim.base].text} at {number(aim.times)} times fewer bytes"
        found, verdict = "", "not all runs are there"
        if mine.runs == mine.wanted and base.runs == base.wanted:
            found, verdict = "diverges", "no"
            if mine.loss is not None and base.loss is not None:
                times = rows["dense adamw", 4].bytes_sent_per_step / mine.bytes_sent_per_step
                found = f"{_share(mine.loss, base.loss)} at {number(times)}"
                met = mine.loss / base.loss - 1.0 <= aim.most and times >= aim.times
                verdict = "yes" if met else "no"
        lines.append((METHODS[aim.method].text, bound, found, verdict))
    return markdown(("method", "at most", "measured", "met"), lines, left=4)


_NAMES = {"none": "no communication", "dense": "dense", "fp16": "fp16", LOW_BIT: "ours, 4 bits"}
MOST_OVER_BOUND = 1.3
"""What one exchange in 1 bit at 100 Mbit/s may take beside its bytes over the bandwidth."""
LEAST_FASTER = 5.0
"""What a step in 4 bits at 1 Gbit/s should gain beside dense."""


def exchanges() -> list[str]:
    """One exchange of ResNet-50's size by bits and network."""
    lines = []
    for r in select(load("low-bit"), bench="low_bit"):
        cells = (str(r["bits"]), names.NETWORKS[r["network"]], number(r["counted_bytes"] * 1e-6))
        lines.append((*cells, number(r["exchange_s"] * 1e3), number(exchange.over_bound(r))))
    return markdown(("bits", "network", "MB", "ms", "over MB / bandwidth"), lines)


def steps() -> list[str]:
    """A step of ResNet-50's gradients by scheme."""
    lines = []
    for schemes in step.starts(load("low-bit")).values():
        for name, r in schemes.items():
            faster = [number(step.times_faster(r, schemes, than)) for than in ("dense", "fp16")]
            lines.append((_NAMES[name], number(r["step_s"] * 1e3), *faster))
    return markdown(("gradients at 1 Gbit/s", "ms a step", "dense /", "fp16 /"), lines)


def time_aims() -> list[str]:
    """Whether the times are what was to be reached."""
    found = load("low-bit")
    bare = exchange.over_bound(one(found, bench="low_bit", bits=1, network="100mbit"))
    (schemes,) = step.starts(found).values()
    faster = step.times_faster(schemes[LOW_BIT], schemes, "dense")
    lines = [
        ("an exchange in 1 bit at 100 Mbit/s, over MB / bandwidth", f"at most {MOST_OVER_BOUND:g}"),
        ("a step in 4 bits at 1 Gbit/s, times faster than dense", f"at least {LEAST_FASTER:g}"),
    ]
    met = (bare <= MOST_OVER_BOUND, faster >= LEAST_FASTER)
    return markdown(
        ("time", "wanted", "measured", "met"),
        [
            (*line, number(value), "yes" if good else "no")
            for line, value, good in zip(lines, (bare, faster), met, strict=True)
        ]
        + time_to_loss.aims(),
        left=4,
    )


TABLES: dict[str, Callable[[], list[str]]] = {
    "state": state,
    "methods": methods,
    "aims": aims,
    "exchanges": exchanges,
    "steps": steps,
    "training": time_to_loss.training,
    "time_aims": time_aims,
}
