"""Pictures of records."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def figure(path: Path, rows: int = 1, columns: int = 1, **options: Any) -> Iterator[tuple[Any, Any]]:
    """Gives `(figure, axes)`, axes as an array `(rows, columns)`; writes the file when the block ends.

    Args:
        path: of the picture; its ending says the format.
        rows, columns: of panels.
        options: for `pyplot.subplots`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn, axes = pyplot.subplots(rows, columns, squeeze=False, **options)
    try:
        yield drawn, axes
        drawn.tight_layout()
        drawn.savefig(path, dpi=110)
    finally:
        pyplot.close(drawn)
