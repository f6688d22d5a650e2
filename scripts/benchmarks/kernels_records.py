"""The records of `scripts/bench kernels`, the same for every device: their keys, their table, the bytes of a kernel's model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

Record = dict[str, Any]
KEYS = (
    "bench", "kernel", "data", "numel", "density", "device", "threads", "metric", "unit", "value", "baseline", "ratio",
)  # fmt: skip
BASELINES = ("r+=g", "torch", "memcpy", "numpy", "cub")


class Model(NamedTuple):
    """What a kernel has to move at least.

    Attributes:
        formula: for the table, with n elements and k places.
        count: bytes of n and k.
    """

    formula: str
    count: Callable[[int, int], float]


_PASS = Model("12 n", lambda n, k: 12 * n)  # read r and g, write r; what is O(k) does not count beside it
MODELS = {
    "select_topk": _PASS,
    "select_threshold": _PASS,
    "select_indices": _PASS,
    "write_back": Model("4 n", lambda n, k: 4 * n),
    "scatter_add": Model("16 k", lambda n, k: 16 * k),  # value, index, read and write of an element
    "random_indices": Model("4 k", lambda n, k: 4 * k),
    "merge_topk": Model("26 k", lambda n, k: 26 * k),  # two lists read, one and two flags an entry written
}
WITH_VELOCITY = Model("20 n", lambda n, k: 20 * n)
HALF_GRADIENT = Model("10 n", lambda n, k: 10 * n)
BY_BITMAP = Model(
    "n/4 + 4 k", lambda n, k: n / 4 + 4 * k
)  # random_indices on CUDA: a bitmap cleared and read


class Records:
    """Collects records and prints a line for each.

    Args:
        device: "cpu" or "cuda".
        threads: of the CPU; 0 on a GPU.
        file: where :meth:`save` writes, or None.
    """

    def __init__(self, device: str, threads: int, file: Path | None = None) -> None:
        self.device, self.threads, self.file = device, threads, file
        self.records: list[Record] = []

    def add(
        self,
        labels: Record,
        value: float,
        baseline: str | None = None,
        ratio: float | None = None,
        *,
        model: Model | None = None,
    ) -> None:
        """Keeps a record; ``labels`` has kernel, data, numel, density, metric, unit. ``model``: not the kernel's usual one."""
        given = {"bench": "kernels", **labels, "device": self.device, "threads": self.threads}
        given |= {"value": value, "baseline": baseline, "ratio": ratio}
        if set(given) != set(KEYS) or baseline not in (None, *BASELINES):
            raise ValueError(f"not a record of {KEYS} against one of {BASELINES}: {given}")
        record = {key: given[key] for key in KEYS}
        self.records.append(record)
        rate = ""
        if record["unit"] == "ms":
            formula, count = model or MODELS[record["kernel"]]
            moved = count(record["numel"], round(record["density"] * record["numel"]))
            rate = f"{moved / value / 1e6:6.1f} GB/s ({formula} bytes)"
        against = "" if ratio is None else f"{ratio:8.3f} x {baseline}"
        print(
            f"{record['kernel']:<16} {record['data']:<28} {record['numel']:>11,} {record['density']:<7g} "
            f"{record['metric']:<17} {value:10.3f} {record['unit']:<4} {against:<18} {rate}".rstrip(),
            flush=True,
        )

    def time(
        self,
        labels: Record,
        ms: float,
        baselines: dict[str, float],
        *,
        metric: str = "time",
        model: Model | None = None,
    ) -> None:
        """One record per baseline: milliseconds, and their ratio to the baseline's."""
        for name, other in baselines.items():
            self.add({**labels, "metric": metric, "unit": "ms"}, ms, name, ms / other, model=model)

    def bandwidth(self, labels: Record, ms: float, copy_ms: float, model: Model | None = None) -> None:
        """GB/s of the kernel's model beside those of a copy of n floats, which reads and writes 8 n bytes."""
        numel = labels["numel"]
        moved = (model or MODELS[labels["kernel"]]).count(numel, round(labels["density"] * numel))
        value, copied = moved / ms / 1e6, 8 * numel / copy_ms / 1e6
        self.add({**labels, "metric": "bandwidth", "unit": "GB/s"}, value, "memcpy", value / copied)

    def save(self) -> None:
        """Writes all records so far, whole or not at all: whoever stops the benchmark keeps what was measured."""
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.file.with_name(f".{self.file.name}.new")
        fresh.write_text(json.dumps(self.records, indent=1) + "\n")
        os.replace(fresh, self.file)
