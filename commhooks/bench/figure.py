"""Pictures of measurements: one style, and one colour for a scheme in all of them.

The background is transparent. Every colour stands out from white, and from the dark theme's black, at 3:1 or
more (WCAG 2.1, 1.4.11).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

INK = "#757575"
"""The colour of text, axes and marks."""
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
    "threshold": "#b03a48",
    "auto": "#0f8a8a",
}
"""Colours by scheme. ``"none"`` is a step without communication."""
STYLE: Any = {
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
"""Settings for ``pyplot.rc_context``."""
WIDTH = 8.0
"""Inches that a page shows without making the picture smaller."""


def color(scheme: str) -> str:
    """The colour of a scheme by its name in records: ``gtopk-tree-mpi`` has that of ``gtopk``.

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
    """Gives ``(figure, axes)``, axes as an array ``(rows, columns)``. Writes the file when the block ends.

    Args:
        path: of the picture; its ending says the format. Its folder is made.
        rows, columns: of panels.
        options: for ``pyplot.subplots``.
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
