"""The figures that the project set itself for a GPU, out of the benchmark's records."""

from __future__ import annotations

from typing import Any, NamedTuple

Record = dict[str, Any]


class Target(NamedTuple):
    """What is asked for, and which record tells: at n, density 0.001."""

    wanted: str
    data: str
    numel: int
    metric: str
    baseline: str | None
    measure: str  # "microseconds" of the value, "ratio", or "inverse" of the ratio


TARGETS = {
    "fraction of a copy's bandwidth, 12 bytes an element, 100M, 0.1 %": Target(
        ">= 0.8", "gaussian", 100_000_000, "bandwidth", "memcpy", "ratio"
    ),
    "times faster than torch.topk alone, 100M, 0.1 %": Target(
        ">= 2", "gaussian", 100_000_000, "time_against_topk", "torch", "inverse"
    ),
    "times faster than CUB and its passes, 100M, 0.1 %": Target(
        ">= 1", "gaussian", 100_000_000, "time", "cub", "inverse"
    ),
    "microseconds for a bucket of 25 MB as hooks pass it (segments), 0.1 %": Target(
        "< 80", "gaussian, segments", 6_553_600, "time", "memcpy", "microseconds"
    ),
    "microseconds for a bucket of 25 MB without segments, 0.1 %": Target(
        "< 80", "gaussian", 6_553_600, "time", "memcpy", "microseconds"
    ),
}


def _measured(record: Record, measure: str) -> float:
    if measure == "microseconds":
        return float(record["value"]) * 1e3
    return float(record["ratio"]) if measure == "ratio" else 1 / float(record["ratio"])


def targets(records: list[Record]) -> dict[str, Any]:
    """Each target with what was measured (None: was not), and the worst hit rate on real gradients."""
    topk = [record for record in records if record["kernel"] == "select_topk"]
    found = {(r["data"], r["numel"], r["density"], r["metric"], r["baseline"]): r for r in topk}
    result: dict[str, Any] = {}
    for name, target in TARGETS.items():
        record = found.get((target.data, target.numel, 0.001, target.metric, target.baseline))
        measured = None if record is None else round(_measured(record, target.measure), 4)
        result[name] = {"wanted": target.wanted, "measured": measured}
    real = [r["value"] for r in topk if r["data"].startswith("real") and r["metric"] == "hit_rate"]
    result["lowest hit rate of the guess on real gradients"] = {
        "wanted": ">= 0.99",
        "measured": min(real, default=None),
    }
    return result
