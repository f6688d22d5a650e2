"""What a reproduction returns, and how it is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.harness.figure import figure as styled_figure

PAPERS = {
    "M-DSGD": "Zhao, Gao, Li: On the Convergence of Memory-Based Distributed SGD (arXiv:1905.12960)",
    "gTop-k": "Shi, Zhao, Wang, Tang, Chu: Convergence Analysis of Distributed SGD with Communication-Efficient "
    "Gradient Sparsification (IJCAI 2019)",
    "M-AVG": "Cong, Liu: Accelerate Distributed Stochastic Descent for Nonconvex Optimization with Momentum "
    "(arXiv:2110.00625)",
    "Local SGD": "Stich: Local SGD Converges Fast and Communicates Little (arXiv:1805.09767)",
    "PR-SGD-M": "Yu, Jin, Yang: On the Linear Speedup Analysis of Communication Efficient Momentum SGD "
    "(arXiv:1905.03817)",
}


@dataclass(frozen=True)
class Claim:
    """One claim of a paper and what was seen of it."""

    name: str  # the figure's file name
    paper: str  # key of PAPERS
    claim: str  # what the paper says
    seen: str  # "seen", "partly seen" or "not seen": decided by the numbers, in code
    finding: str  # one or two sentences with the numbers
    how: str  # problem, sizes, and whether the library or the simulation ran


@dataclass(frozen=True)
class Budget:
    """How much to compute and where figures go."""

    folder: Path
    quick: bool = False

    def steps(self, count: int) -> int:
        """``count``, or an eighth of it (at least 16) in a quick run, which proves nothing but that it runs."""
        return max(16, count // 8) if self.quick else count

    def repeats(self, count: int) -> int:
        """Independent repeats."""
        return 1 if self.quick else count


@contextmanager
def figure(budget: Budget, name: str, panels: int = 1) -> Iterator[Any]:
    """A figure with ``panels`` axes side by side, saved as ``name``.png at the end.

    Panels whose curves have the same labels share one legend, below them, so that it hides no curve.
    """
    size = (1.2 + 4.4 * panels, 3.6)
    with styled_figure(budget.folder / f"{name}.png", 1, panels, figsize=size) as (drawn, axes):
        yield axes[0] if panels > 1 else axes[0][0]
        found = [axis.get_legend_handles_labels() for axis in axes[0]]
        names = [labels for _, labels in found if labels]
        if panels > 1 and all(labels == names[0] for labels in names):
            handles = next(handles for handles, labels in found if labels)
            drawn.legend(handles, names[0], loc="outside lower center", ncols=len(names[0]), fontsize=8)
        else:
            for axis, (_, labels) in zip(axes[0], found, strict=True):
                if labels:
                    axis.legend(fontsize=7)
        for axis in axes[0]:
            for side in (axis.xaxis, axis.yaxis):
                if side.get_scale() == "log":
                    readable(side)


def readable(side: Any) -> None:
    """Gives a logarithmic axis at least three numbers, however little it spans."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    low, high = side.get_view_interval()
    if side.get_transform().base == 2 or high / low >= 1000:
        return
    side.set_major_locator(MaxNLocator(5) if high / low < 4 else LogLocator(subs=(1, 2, 5), numticks=20))
    side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    side.set_minor_formatter(NullFormatter())


def slope(x: list[float], y: list[float]) -> float:
    """Least-squares slope of log y against log x."""
    lx, ly = torch.tensor(x).double().log(), torch.tensor(y).double().log()
    lx, ly = lx - lx.mean(), ly - ly.mean()
    return float((lx * ly).sum() / lx.square().sum())


def verdict(*tests: bool) -> str:
    """Says "seen" if all hold, "partly seen" if some do."""
    return "seen" if all(tests) else "partly seen" if any(tests) else "not seen"
