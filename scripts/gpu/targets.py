"""The figures that the project set itself for a GPU, out of the benchmark's records."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from benchmarks.kernels.records import bandwidth, copy_bandwidth, ratio

Record = dict[str, Any]


class Target(NamedTuple):
    """What is asked for, and of which time of select_topk: on ``data``, n elements, density 0.001."""

    wanted: str
    data: str
    numel: int
    measure: Callable[[Record], float | None]  # None: not measured


def _microseconds(record: Record) -> float:
    return float(record["value"]) * 1e3


def _of_copy(record: Record) -> float | None:
    copied = copy_bandwidth(record)
    return None if copied is None else bandwidth(record) / copied


def _times_faster(than: str, record: Record) -> float | None:
    found = ratio(record, than)
    return None if found is None else 1 / found


TARGETS = {
    "fraction of a copy's bandwidth, 12 bytes an element, 100M, 0.1 %": Target(
        ">= 0.8", "gaussian", 100_000_000, _of_copy
    ),
    "times faster than torch.topk alone, 100M, 0.1 %": Target(
        ">= 2", "gaussian", 100_000_000, partial(_times_faster, "torch.topk")
    ),
    "times faster than CUB and its passes, 100M, 0.1 %": Target(
        ">= 1", "gaussian", 100_000_000, partial(_times_faster, "cub")
    ),
    "microseconds for a bucket of 25 MB as hooks pass it (segments), 0.1 %": Target(
        "< 80", "gaussian, segments", 6_553_600, _microseconds
    ),
    "microseconds for a bucket of 25 MB without segments, 0.1 %": Target(
        "< 80", "gaussian", 6_553_600, _microseconds
    ),
}


def targets(records: list[Record]) -> dict[str, Any]:
    """Each target with what was measured (None: was not), and the worst hit rate on real gradients."""
    topk = [record for record in records if record["kernel"] == "select_topk"]
    times = {(r["data"], r["numel"], r["density"]): r for r in topk if r["metric"] == "time"}
    result: dict[str, Any] = {}
    for name, target in TARGETS.items():
        record = times.get((target.data, target.numel, 0.001))
        measured = None if record is None else target.measure(record)
        result[name] = {"wanted": target.wanted, "measured": None if measured is None else round(measured, 4)}
    real = [r["value"] for r in topk if r["data"].startswith("real") and r["metric"] == "hit_rate"]
    result["lowest hit rate of the guess on real gradients"] = {
        "wanted": ">= 0.99",
        "measured": min(real, default=None),
    }
    return result
