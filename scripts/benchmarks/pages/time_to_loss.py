"""Time to dense AdamW's loss across a limited link: curves of the study, and the time of a step that trains.

A link changes how long a step takes and not what it computes. So the loss by step is the study's, and the seconds a
step are those of `scripts/bench lowbit` on the same model and batches.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from studies import slow_links

from ..harness import names
from ..harness.figure import WIDTH, color, figure
from ..harness.records import Record, load, one, select
from ..harness.table import markdown, number
from ..network.training import DENSE, METHODS

Curve = Sequence[tuple[int, float]]
"""(step, loss), by step."""
NEEDS = "dense adamw", "muon k4", "muon k14", "lowbit4 adamw"
"""Methods of the study without whose curves there is no table."""
_COLORS = {DENSE: "dense", "fp16": "fp16", "powersgd2": "powersgd2", "lowbit4 adamw": "lowbit"}
_SHORT = {
    DENSE: "dense",
    "fp16": "fp16",
    "powersgd2": "PowerSGD",
    "lowbit4 adamw": "4 bits",
    "muon k4": "Muon, 1 bit every 4",
    "muon k14": "Muon, 1 bit every 14",
}


class Aim(NamedTuple):
    """How much sooner Muon with 1 bit every 4 steps reaches dense AdamW's loss than another method.

    Attributes:
        network: where.
        other: a name in METHODS.
        least: times sooner.
    """

    network: str
    other: str
    least: float


AIMS = (
    Aim("10mbit", DENSE, 20.0),
    Aim("10mbit", "fp16", 8.0),
    Aim("10mbit", "powersgd2", 3.0),
    Aim("100mbit", DENSE, 4.0),
)
OURS = "muon k4"
_LABEL_DISTANCE = 0.07  # between two labels of the picture, in units of the loss


def curves(found: Sequence[Record]) -> dict[str, dict[int, Curve]]:
    """By method and seed the curve at the method's best rate. torch's hooks have dense AdamW's.

    fp16 gradients and PowerSGD's cannot be expected to train better than dense ones, so this is the least time that
    these two may take.
    """
    known: dict[str, dict[int, Curve]] = {}
    for row in slow_links.rows(found):
        if row.ranks != 4 or row.runs == 0:
            continue
        for run in select(found, bench="run", method=row.method, ranks=4, lr=row.lr):
            losses = run.get("curve")
            if losses and None not in losses:
                steps = [*range(slow_links.CURVE_EVERY, run["step"], slow_links.CURVE_EVERY), run["step"]]
                known.setdefault(row.method, {})[run["seed"]] = list(zip(steps, losses, strict=True))
    for method, timed in METHODS.items():
        if timed.hook and DENSE in known:
            known[method] = known[DENSE]
    return known


def steps_to(curve: Curve, loss: float) -> float | None:
    """The step at which a curve first is at `loss` or below, by straight lines between its points; None: never."""
    before: tuple[int, float] | None = None
    for step, value in curve:
        if value <= loss:
            if before is None or value == loss:
                return float(step)
            share = (before[1] - loss) / (before[1] - value)
            return before[0] + share * (step - before[0])
        before = step, value
    return None


def steps_to_dense(known: Mapping[str, Mapping[int, Curve]], method: str) -> float | None:
    """The median over seeds of the steps to the loss with which dense AdamW ends at that seed; None: not reached."""
    dense, mine = known[DENSE], known.get(method, {})
    found = [steps_to(mine[seed], dense[seed][-1][1]) for seed in sorted(dense.keys() & mine.keys())]
    reached = [steps for steps in found if steps is not None]
    return statistics.median(reached) if reached and len(reached) == len(found) else None


def seconds_to_dense(network: str) -> dict[str, float | None]:
    """By method the seconds to dense AdamW's loss; None: not reached. Empty: curves or times are not there yet."""
    known, timed = curves(load("slow-links")), select(load("low-bit"), bench="training", network=network)
    if not timed or not known.keys() >= set(NEEDS):
        return {}
    found: dict[str, float | None] = {}
    for method in METHODS:
        steps = steps_to_dense(known, method)
        found[method] = None if steps is None else steps * one(timed, method=method)["step_s"]
    return found


def training() -> list[str]:
    """Seconds a step, steps and seconds to dense AdamW's loss, and how much sooner, by network and method."""
    known, lines = curves(load("slow-links")), []
    for network in dict.fromkeys(aim.network for aim in AIMS):
        seconds = seconds_to_dense(network)
        for method, mine in seconds.items():
            timed = one(load("low-bit"), bench="training", network=network, method=method)
            steps = steps_to_dense(known, method)
            cells = [
                METHODS[method].text,
                names.NETWORKS[network],
                number(timed["step_s"] * 1e3),
                number(timed["interface_bytes"] * 1e-3),
            ]
            cells += ["never", ""] if steps is None or mine is None else [f"{steps:.0f}", number(mine)]
            cells += [_sooner(seconds, method, other) for other in (DENSE, "fp16", "powersgd2")]
            lines.append(cells)
    head = (
        "method",
        "network",
        "ms a step",
        "kB a step",
        "steps",
        "seconds",
        "dense /",
        "fp16 /",
        "PowerSGD /",
    )
    return markdown(head, lines)


def _sooner(seconds: Mapping[str, float | None], mine: str, other: str) -> str:
    a, b = seconds.get(mine), seconds.get(other)
    return "" if a is None or b is None else number(b / a)


def aims() -> list[tuple[str, str, str, str]]:
    """What is wanted of the time to loss, as rows of a table; a row without a figure has no records yet."""
    lines = []
    for aim in AIMS:
        seconds = seconds_to_dense(aim.network)
        text = f"time to the loss across {names.NETWORKS[aim.network]}: {METHODS[aim.other].text} over Muon, 1 bit every 4 steps"
        mine, other = seconds.get(OURS), seconds.get(aim.other)
        if mine is None or other is None:
            lines.append((text, f"at least {aim.least:g}", "", "not reached" if seconds else "not measured"))
        else:
            lines.append(
                (
                    text,
                    f"at least {aim.least:g}",
                    number(other / mine),
                    "yes" if other / mine >= aim.least else "no",
                )
            )
    return lines


def plot(file: Path) -> None:
    """Loss against seconds across 10 Mbit/s, and against the bytes that a rank has sent."""
    known, timed = curves(load("slow-links")), select(load("low-bit"), bench="training", network="10mbit")
    with figure(file, columns=2, figsize=(WIDTH, 3.8), sharey=True) as (whole, axes):
        lines = []
        for axis, unit, label in (
            (axes[0, 0], "step_s", "seconds across 10 Mbit/s"),
            (axes[0, 1], "interface_bytes", "MB that a rank sends"),
        ):
            drawn: list[Any] = []
            for method in METHODS:
                times = select(timed, method=method)
                if not times or method not in known:
                    continue
                by_seed = list(known[method].values())
                steps = [step for step, _ in by_seed[0]]
                losses = [
                    statistics.median(values)
                    for values in zip(*([y for _, y in c] for c in by_seed), strict=True)
                ]
                each = times[0][unit] * (1e-6 if unit == "interface_bytes" else 1.0)
                dashed = "--" if method == "muon k14" or METHODS[method].hook else "-"
                drawn += axis.plot(
                    [step * each for step in steps],
                    losses,
                    dashed,
                    color=color(_COLORS.get(method, "averaging")),
                    label=_SHORT[method],
                )
            axis.set(xscale="log", xlabel=label)
            lines.append(drawn)
        axes[0, 0].set_ylabel("loss on held-out text")
        whole.suptitle(
            "Loss measured on 4 ranks, over the time of measured steps and the bytes of an interface"
        )
        _label(axes[0, 1], lines[1])


def _label(axis: Any, lines: Sequence[Any]) -> None:
    """Names the lines right of the axes, in order of where they end. They end at different places."""
    height = float("-inf")
    for line in sorted(lines, key=lambda line: line.get_ydata()[-1]):
        end = line.get_xdata()[-1], line.get_ydata()[-1]
        height = max(end[1], height + _LABEL_DISTANCE)
        arrow = {"arrowstyle": "-", "color": line.get_color(), "lw": 0.5, "alpha": 0.6}
        where = {"xytext": (1.03, height), "textcoords": axis.get_yaxis_transform(), "va": "center"}
        axis.annotate(line.get_label(), end, **where, fontsize=8, color=line.get_color(), arrowprops=arrow)
