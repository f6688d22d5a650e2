"""Pictures of records, in the style of `commhooks bench --plot`: a scheme has one colour in all of them.

Lines are labelled where they end, so that no colour has to be looked up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from commhooks.bench.figure import COLORS, INK, STYLE, WIDTH, color, figure

__all__ = ["COLORS", "INK", "STYLE", "WIDTH", "color", "figure", "label_ends"]


def label_ends(axis: Any, lines: Sequence[Any], distance: float = 9.5) -> None:
    """Writes each line's label behind its last point, in its colour, and keeps labels `distance` points apart.

    Call it last: it takes the axes' scales and limits as they are.

    Args:
        axis: of the lines.
        lines: what `axis.plot` returned, each with a label.
        distance: between the middles of two labels, in points (1/72 inch).
    """
    axis.figure.draw_without_rendering()  # the layout decides how tall the axes are
    scale = 72 / axis.figure.dpi
    ends = [axis.transData.transform((line.get_xdata()[-1], line.get_ydata()[-1])) * scale for line in lines]
    order = sorted(range(len(lines)), key=lambda i: ends[i][1])
    heights = [ends[i][1] for i in order]
    for _ in range(100):  # neighbours that are too close move apart by half of what is missing
        for i in range(len(heights) - 1):
            lacking = distance - (heights[i + 1] - heights[i])
            if lacking > 0:
                heights[i] -= lacking / 2
                heights[i + 1] += lacking / 2
    right = axis.transAxes.transform((1.0, 0.0))[0] * scale
    for i, height in zip(order, heights, strict=True):
        line, (x, y) = lines[i], ends[i]
        axis.annotate(
            line.get_label(), (line.get_xdata()[-1], line.get_ydata()[-1]), xycoords="data", va="center",
            xytext=(max(right - x, 0) + 6, height - y), textcoords="offset points", fontsize=8,
            color=line.get_color(), annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": line.get_color(), "lw": 0.5, "alpha": 0.6, "shrinkA": 0, "shrinkB": 0},
        )  # fmt: skip
