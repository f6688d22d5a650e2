"""The pictures of docs/performance, each from its records."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..harness.records import FOLDER, Record, load, measured
from ..network import accuracy, fit, overlap, step
from . import time_to_loss


def _drawn(plot: Callable[[list[Record], Path], None], name: str, file: Path) -> None:
    plot(measured(load(name)), file)


PICTURES: dict[Path, Callable[[Path], None]] = {
    FOLDER / "network.png": partial(_drawn, step.plot, "network"),
    FOLDER / "network-timeline.png": partial(_drawn, step.plot_timeline, "network"),
    FOLDER / "network-overlap.png": partial(_drawn, overlap.plot, "overlap"),
    FOLDER / "network-accuracy.png": partial(_drawn, accuracy.plot, "accuracy"),
    FOLDER / "slow-links.png": time_to_loss.plot,
    FOLDER / "network-scaling.png": lambda file: fit.plot(load("fit"), file),
}
