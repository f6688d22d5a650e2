"""What the programs share: the GPU, or in a dry run the CPU with emulated kernels; their options; their results.

They run as ``python -m gpu.programs.NAME`` with the checkout, ``scripts``, ``tests`` and ``tests/native`` on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from gpu.runner import STEP

T = TypeVar("T")


class Place:
    """Where a program runs.

    Attributes:
        dry: whether there is no GPU: everything runs once or twice, at tiny sizes, on the CPU.
        device: "cuda" or "cpu".
        json: the file for the results, or None.
    """

    def __init__(self, dry: bool, json_file: Path | None) -> None:
        self.dry, self.json = dry, json_file
        self.device = "cpu" if dry else "cuda"
        self._results: dict[str, Any] = {}

    def pick(self, real: T, dry: T) -> T:
        """A size or a number of repetitions: ``real`` on a GPU, ``dry`` in a dry run."""
        return dry if self.dry else real

    def synchronize(self) -> None:
        """Waits for the device."""
        if not self.dry:
            torch.cuda.synchronize()

    def busy(self, cycles: int) -> None:
        """Keeps the current stream busy for so many clock cycles, so that what follows is queued and not done at once."""
        if not self.dry:
            torch.cuda._sleep(cycles)

    def instant(self) -> Any:
        """A moment of the current stream; see :meth:`ms_between`."""
        if self.dry:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms_between(self, begin: Any, end: Any) -> float:
        """Milliseconds between two moments, after :meth:`synchronize`."""
        return 1e3 * (end - begin) if self.dry else float(begin.elapsed_time(end))

    def keep(self, name: str, value: Any) -> None:
        """Adds a result and writes the file: whoever stops the program keeps what it has."""
        self._results[name] = value
        if self.json is not None:
            fresh = self.json.with_name(f".{self.json.name}.new")
            fresh.write_text(json.dumps(self._results) + "\n")
            os.replace(fresh, self.json)


def begin(
    description: str, add: Callable[[argparse.ArgumentParser], None] | None = None
) -> tuple[Place, Any]:
    """Reads the options; in a dry run puts the emulated kernels in place of the GPU's.

    Args:
        description: for ``--help``.
        add: adds options of the program's own.

    Returns:
        The place and the options.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, at tiny sizes")
    parser.add_argument("--library", type=Path, help="the emulated kernels, in a dry run")
    parser.add_argument("--json", type=Path, help="where the results go")
    if add is not None:
        add(parser)
    options = parser.parse_args()
    faulthandler.enable()
    if options.dry_run and options.library is not None:
        import cuda_runs

        cuda_runs.emulate(options.library)
    if not options.dry_run:
        torch.cuda.set_device(0)
    return Place(options.dry_run, options.json), options


def step(name: str) -> None:
    """Says what comes next; when the program hangs, that is what it hung in."""
    sys.stdout.write(f"{STEP}{name}\n")  # in one piece: ranks share the output
    sys.stdout.flush()


def median(values: list[float]) -> float:
    """The median, to five digits."""
    return float(f"{statistics.median(values):.5g}")
