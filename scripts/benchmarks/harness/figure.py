"""Pictures of records: one style, and one colour for a scheme in all of them.

The background is transparent, and every colour stands out from white and from the dark theme's black at 3:1 or more
(WCAG 2.1, 1.4.11). Lines are labelled where they end, so that no colour has to be looked up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

INK = "#757575"  # text, axes and marks
COLORS = {
    "none": "#949494",
    "dense": "#646464",
    "fp16": "#a56a34",
    "bf16": "#a56a34",
    "powersgd": "#9258c8",
    "topk": "#2a78c2",
    "gtopk": "#d4600a",
    "randomk": "#2b8a3e",
    "lowbit": "#b8860b",
    "averaging": "#c2408a",
    "auto": "#0f8a8a",
}
STYLE = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "savefig.dpi": 130,
    "font.size": 9,
    "axes.titlesize": 9,
    "figure.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.labelcolor": INK,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "grid.color"), INK
    ),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
}
WIDTH = 8.0  # inches: what a page shows without making it smaller


def color(scheme: str) -> str:
    """The colour of a scheme by its name in records: `gtopk-tree-mpi` has that of `gtopk`.

    Raises:
        ValueError: no colour is given to it.
    """
    family = scheme.removesuffix("-mpi").removesuffix("-tree")
    found = COLORS.get(family) or COLORS.get(family.rstrip("0123456789"))
    if found is None:
        raise ValueError(f"scheme {scheme!r} has no colour, only {', '.join(COLORS)} have")
    return found


@contextmanager
def figure(path: Path, rows: int = 1, columns: int = 1, **options: Any) -> Iterator[tuple[Any, Any]]:
    """Gives `(figure, axes)`, axes as an array `(rows, columns)`; writes the file when the block ends.

    Args:
        path: of the picture; its ending says the format. Its folder is made.
        rows, columns: of panels.
        options: for `pyplot.subplots`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    with pyplot.rc_context(STYLE):
        drawn, axes = pyplot.subplots(rows, columns, squeeze=False, layout="constrained", **options)
        try:
            yield drawn, axes
            drawn.savefig(path)
        finally:
            pyplot.close(drawn)


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
