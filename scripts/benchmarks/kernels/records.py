"""The kernels' records, the same for every device: keys, printed line, bytes that a kernel has to move."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from ..harness import records as files
from ..harness.records import Record

KEYS = (
    "bench", "kernel", "data", "numel", "density", "device", "threads",
    "metric", "unit", "value", "baselines",
)  # fmt: skip
BASELINES = ("r+=g", "r*=a", "torch", "torch.topk", "memcpy", "numpy", "cub", "in place")


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
MODELS |= dict.fromkeys(("low_bit_encode", "low_bit_decode_add"), Model("8 n", lambda n, k: 8 * n))
WITH_VELOCITY = Model("20 n", lambda n, k: 20 * n)
MODELS |= {"select_topk, apart": _PASS, "select_topk, apart, velocity": WITH_VELOCITY}
HALF_GRADIENT = Model("10 n", lambda n, k: 10 * n)
BY_BITMAP = Model(
    "n/4 + 4 k", lambda n, k: n / 4 + 4 * k
)  # random_indices on CUDA: a bitmap cleared and read


def ratio(record: Record, baseline: str) -> float | None:
    """The kernel's time over that of a baseline of the same run; None where it was not measured."""
    other = record["baselines"].get(baseline)
    return None if other is None else record["value"] / other


def bandwidth(record: Record, model: Model | None = None) -> float:
    """GB/s of the kernel's model (`model`: not its usual one) in the time of the record."""
    count = (model or MODELS[record["kernel"]]).count
    return count(record["numel"], round(record["density"] * record["numel"])) / record["value"] / 1e6


def copy_bandwidth(record: Record) -> float | None:
    """GB/s of a copy of n floats, which reads and writes 8 n bytes; None where it was not measured."""
    ms = record["baselines"].get("memcpy")
    return None if ms is None else 8 * record["numel"] / ms / 1e6


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
        baselines: Mapping[str, float] | None = None,
        *,
        model: Model | None = None,
    ) -> None:
        """Keeps a record.

        Args:
            labels: kernel, data, numel, density, metric, unit.
            value: in that unit.
            baselines: what was timed in turn with the kernel, by name, in the same unit.
            model: of the bytes in the printed line; None: the kernel's usual one.

        Raises:
            ValueError: other labels, or an unknown baseline.
        """
        given = {"bench": "kernels", **labels, "device": self.device, "threads": self.threads}
        given |= {"value": value, "baselines": dict(baselines or {})}
        if set(given) != set(KEYS) or not set(given["baselines"]) <= set(BASELINES):
            raise ValueError(f"not a record of {KEYS} against some of {BASELINES}: {given}")
        record = {key: given[key] for key in KEYS}
        self.records.append(record)
        print(line(record, model), flush=True)

    def time(
        self,
        labels: Record,
        ms: float,
        baselines: Mapping[str, float],
        *,
        metric: str = "time",
        model: Model | None = None,
    ) -> None:
        """A record in milliseconds: the kernel's, and those of each baseline."""
        self.add({**labels, "metric": metric, "unit": "ms"}, ms, baselines, model=model)

    def save(self) -> None:
        """Writes all records so far; whoever stops the benchmark keeps what was measured."""
        if self.file is not None:
            files.save(self.records, self.file)


def line(record: Record, model: Model | None = None) -> str:
    """A record with its ratios and, for a time, the bytes of the kernel's model a second."""
    what = f"{record['kernel']:<16} {record['data']:<28} {record['numel']:>11,} {record['density']:<7g}"
    parts = [f"{what} {record['metric']:<9} {record['value']:10.3f} {record['unit']:<3}"]
    if record["unit"] == "ms":
        formula = (model or MODELS[record["kernel"]]).formula
        parts.append(f"{bandwidth(record, model):6.1f} GB/s ({formula} bytes)")
    parts += [f"{ratio(record, name):.3g} x {name}" for name in record["baselines"]]
    return "  ".join(parts).rstrip()
