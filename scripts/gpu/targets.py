"""The figures that the project set itself for a GPU: what was measured, whether that meets them, and where the time went."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.kernels.records import bandwidth, copy_bandwidth, ratio

Record = dict[str, Any]
Results = dict[str, Any]
COPY_BYTES, PASS_BYTES = 8, 12  # an element of a copy: read and written; of the pass: two read, one written
PLAIN, AGAIN = "plain DDP", "plain DDP, again"
SCALED = ", GradScaler"  # at the end of a hook's name: compared with plain DDP under a GradScaler
SPARSE = ("top-k", "gTop-k", "random-k")


class Target(NamedTuple):
    """One line of the targets.

    Attributes:
        name: what is measured, with its unit.
        wanted: the bound, and whether the figure must not be below it ("at least") or above.
        measured: the figure out of the results, or None.
        why: where the time went, for a figure that misses the bound.
        cards: the target holds on cards with this in their name; elsewhere the figure is only reported.
    """

    name: str
    at_least: bool
    wanted: float
    measured: Callable[[Results], float | None]
    why: Callable[[Results], str]
    cards: str = ""


def records(results: Results) -> list[Record]:
    """The benchmark's records, of both parts."""
    return [*results.get("benchmark-aims", []), *results.get("benchmark-rest", [])]


def time_of(results: Results, data: str, numel: int, density: float = 0.001) -> Record | None:
    """The record of ``select_topk``'s time."""
    wanted = ("select_topk", data, numel, density, "time")
    keys = ("kernel", "data", "numel", "density", "metric")
    return next((r for r in records(results) if tuple(r[key] for key in keys) == wanted), None)


def of_copy(numel: int) -> Callable[[Results], float | None]:
    """Percent of a copy's bandwidth that select_topk reaches, 12 bytes an element."""

    def measured(results: Results) -> float | None:
        found = time_of(results, "gaussian", numel)
        copied = None if found is None else copy_bandwidth(found)
        return None if found is None or copied is None else 100.0 * bandwidth(found) / copied

    return measured


def faster_than(baseline: str) -> Callable[[Results], float | None]:
    """The baseline's time over select_topk's, at 100M."""

    def measured(results: Results) -> float | None:
        found = time_of(results, "gaussian", 100_000_000)
        slower = None if found is None else ratio(found, baseline)
        return None if slower is None else 1.0 / slower

    return measured


def bucket_us(results: Results) -> float | None:
    """Microseconds for a bucket of 25 MB with segments."""
    found = time_of(results, "gaussian, segments", 6_553_600)
    return None if found is None else 1e3 * found["value"]


def hit_rate(results: Results) -> float | None:
    """The lowest on real gradients, in percent."""
    found = [
        r["value"] for r in records(results) if r["data"].startswith("real") and r["metric"] == "hit_rate"
    ]
    return 100.0 * min(found) if found else None


def overhead(results: Results, model: str, hook: str) -> float | None:
    """Percent that a step with the hook takes longer than one of plain DDP, the mean of its two measurements.

    With a GradScaler, than one of plain DDP with a GradScaler.
    """
    steps = results.get(model, {})
    beside = (f"{PLAIN}{SCALED}",) if hook.endswith(SCALED) else (PLAIN, AGAIN)
    plain = [steps[name]["ms"] for name in beside if name in steps]
    if hook not in steps or not plain:
        return None
    return 100.0 * (steps[hook]["ms"] / (sum(plain) / len(plain)) - 1.0)


def worst_overhead(model: str) -> Callable[[Results], float | None]:
    """The largest of the three sparse schemes."""

    def measured(results: Results) -> float | None:
        found = [overhead(results, model, hook) for hook in SPARSE]
        known = [percent for percent in found if percent is not None]
        return max(known) if known else None

    return measured


def why_selection(case: str) -> Callable[[Results], str]:
    """The split of a selection beside the time that a copy would take for the pass's bytes."""

    def why(results: Results) -> str:
        split = results.get("split", {}).get(case)
        if not split:
            return "no kernel split"
        parts = dict(split["parts"])
        text = f"of {split['us']:g} us: pass {parts.pop('pass', 0.0):g}"
        copy = time_of(results, "gaussian", split["numel"], split["density"])
        if copy is not None and "memcpy" in copy["baselines"]:
            ideal = 1e3 * copy["baselines"]["memcpy"] * PASS_BYTES / COPY_BYTES
            text += f" (its {PASS_BYTES} n bytes at a copy's speed: {ideal:.1f})"
        rest = [f"{name} {us:g}" for name, us in sorted(parts.items(), key=lambda pair: -pair[1])]
        text = ", ".join([text, *rest, f"between kernels {split['gaps']:g}"])
        seen = results.get("ncu", {}).get(case, {}).get("pass", {})
        return text + "".join(
            f"; pass: {name} {value:g} %" for name, value in seen.items() if "Throughput" in name
        )

    return why


def why_step(model: str) -> Callable[[Results], str]:
    """The worst scheme's tail and what its worker did."""

    def why(results: Results) -> str:
        steps = results.get(model, {})
        known = [(overhead(results, model, hook), hook) for hook in SPARSE]
        worst = max((pair for pair in known if pair[0] is not None), default=None)
        if worst is None or PLAIN not in steps:
            return ""
        mine, plain = steps[worst[1]], steps[PLAIN]
        worker = ", ".join(f"{phase} {ms:g}" for phase, ms in mine.get("worker_ms", {}).items())
        return (
            f"{worst[1]}: {mine['ms']:g} ms a step against {plain['ms']:g}; after the last gradient "
            f"{mine['tail_ms']:g} ms against {plain['tail_ms']:g}; the worker's ms: {worker}"
        )

    return why


def nothing(results: Results) -> str:
    """No reason is known."""
    return ""


_M100 = why_selection("100M, 0.1 %")
TARGETS = (
    Target("select_topk, 100M, density 0.001: % of a copy's bandwidth", True, 80.0, of_copy(100_000_000), _M100),
    Target("select_topk, 25M, 0.001: % of a copy's bandwidth", True, 60.0, of_copy(25_000_000), why_selection("25M, 0.1 %")),
    Target("25 MB bucket with segments, 0.001: microseconds", False, 80.0, bucket_us, why_selection("6.55M, 0.1 %, segments"), "H100"),
    Target("100M, 0.001: times faster than torch.topk alone", True, 2.0, faster_than("torch.topk"), _M100, "H100"),
    Target("100M, 0.001: times faster than CUB with its add", True, 1.4, faster_than("cub"), _M100, "H100"),
    Target("ResNet-50, worst sparse hook: % of the step", False, 5.0, worst_overhead("resnet50"), why_step("resnet50")),
    Target("GPT of 124M, worst sparse hook: % of the step", False, 5.0, worst_overhead("gpt"), why_step("gpt")),
    Target("hit rate of the guess on real gradients, lowest: %", True, 99.0, hit_rate, nothing),
)  # fmt: skip


CLEAN = (
    "stress",
    "native tests",
    "CuPy and array interface",
    "ranks on one device",
    "DDP",
    "two ranks on one GPU",
    "Horovod",
)
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")


def not_clean(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The last line of the targets: tests and sanitizers that ran and did not pass, or did not come to their end."""
    ours = [entry for entry in entries if entry["name"] in CLEAN + SANITIZERS]
    bad = [entry["name"] for entry in ours if entry["verdict"] not in ("pass", "skip")]
    measured = len(bad) if any(entry["verdict"] == "pass" for entry in ours) or bad else None
    met = None if measured is None else not bad
    return {
        "name": "tests and sanitizers without a pass",
        "wanted": "<= 0",
        "measured": measured,
        "met": met,
        "why": ", ".join(bad),
    }


def targets(results: Results, device: str, entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each target with what was measured, and whether all was clean.

    ``met`` is None where nothing was measured, or where this card has no such target.
    """
    rows = []
    for target in TARGETS:
        value = target.measured(results)
        met = None
        if value is not None and target.cards in device:
            met = value >= target.wanted if target.at_least else value <= target.wanted
        rows.append(
            {
                "name": target.name,
                "wanted": f"{'>=' if target.at_least else '<='} {target.wanted:g}",
                "measured": None if value is None else float(f"{value:.4g}"),
                "met": met,
                "why": target.why(results) if met is False else "",
            }
        )
    return [*rows, not_clean(entries)]
