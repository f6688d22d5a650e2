"""From the ranks' figures to records, a table and a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.namespaces import NETWORKS
from benchmarks.network_models import MODELS, numel
from benchmarks.network_schemes import PEERS, is_ours

KEYS = (
    "bench",
    "scheme",
    "model",
    "numel",
    "density",
    "ranks",
    "network",
    "metric",
    "unit",
    "value",
    "baseline",
    "ratio",
)
Record = dict[str, Any]
Figures = dict[str, Any]


def bound_s(figures: Figures, compute_s: float, network: str) -> float:
    """The step without communication plus wire bytes over bandwidth.

    Wire bytes are our own count for our schemes and the interface's for torch's, whose bytes nobody counts.
    """
    wire = figures["counted_bytes"] or figures["interface_bytes"]
    if figures["scheme"] == "none":
        wire = 0.0
    return compute_s + wire * 8e-6 / NETWORKS[network]


def records_of(cases: Sequence[Figures], ranks: int, network: str) -> list[Record]:
    """Records of one model's cases on one network; ratio = value / the baseline's value, one per baseline."""
    steps = {c["scheme"]: median(c["seconds"]) for c in cases}
    dense = next((c for c in cases if c["scheme"] == "dense"), None)
    compute = steps.get("none", float("nan"))
    records: list[Record] = []
    for case in cases:
        scheme = case["scheme"]
        common = {
            "bench": "network",
            "scheme": scheme,
            "model": case["model"],
            "numel": numel(MODELS[case["model"]]()),
            "density": case["density"] if is_ours(scheme) else 1.0,
            "ranks": ranks,
            "network": network,
        }

        def add(
            metric: str,
            unit: str,
            value: float,
            baseline: str | None,
            against: float | None,
            of: Any = common,
        ) -> None:
            ratio = value / against if against else None
            records.append(
                of | {"metric": metric, "unit": unit, "value": value, "baseline": baseline, "ratio": ratio}
            )

        if "none" in steps:
            add("step", "s", steps[scheme], "bound", bound_s(case, compute, network))
            add("compute", "s", compute, "none", compute)
        for baseline in ("none", *PEERS):
            if baseline in steps:
                add("step", "s", steps[scheme], baseline, steps[baseline])
        for phase, seconds in case["phases"].items() if is_ours(scheme) else ():
            wire_s = case["counted_bytes"] * 8e-6 / NETWORKS[network]
            is_wire = phase == "exchange"
            add(phase, "s", seconds, "bound" if is_wire else "none", wire_s if is_wire else steps.get("none"))
        for metric in ("interface_bytes", "counted_bytes"):
            if metric == "interface_bytes" or is_ours(scheme):
                add(metric, "B", case[metric], "dense", dense["interface_bytes"] if dense else None)
        add("timed_steps", "1", float(len(case["seconds"])), None, None)
    return records


def table(records: Iterable[Record]) -> str:
    """One line for each scheme, model, number of ranks and network."""
    rows: dict[tuple[Any, ...], dict[tuple[str, str | None], Record]] = {}
    for r in records:
        if r["bench"] == "network":
            key = (r["model"], r["ranks"], r["network"], r["scheme"])
            rows.setdefault(key, {})[r["metric"], r["baseline"]] = r
    head = (
        "scheme",
        "step",
        "compute",
        "select",
        "exchange",
        "write",
        "MB wire",
        "MB count",
        "bound",
        "/bound",
    )
    head += ("dense/", "fp16/", "psgd1/", "n")
    lines: list[str] = []
    previous: tuple[Any, ...] = ()
    for key, row in rows.items():
        if key[:3] != previous:
            previous = key[:3]
            lines += ["", f"{key[0]}, {key[1]} ranks, {key[2]} (ms; x/ = how many times slower x is)"]
            lines.append("".join(f"{h:>10}" if i else f"{h:<16}" for i, h in enumerate(head)))
        lines.append(_line(key[3], row))
    return "\n".join(lines)


def _line(scheme: str, row: dict[tuple[str, str | None], Record]) -> str:
    def value(metric: str, factor: float) -> str:
        found = next((r["value"] for (m, _), r in row.items() if m == metric), None)
        return "-" if found is None else f"{found * factor:.4g}"

    def ratio(baseline: str, inverse: bool) -> float | None:
        record = row.get(("step", baseline))
        if record is None or not record["ratio"]:
            return None
        return 1 / record["ratio"] if inverse else record["ratio"]

    step = next((r["value"] for (m, _), r in row.items() if m == "step"), float("nan"))
    over = ratio("bound", False)
    cells = [value("step", 1e3), value("compute", 1e3), value("select", 1e3), value("exchange", 1e3)]
    cells += [value("write_back", 1e3), value("interface_bytes", 1e-6), value("counted_bytes", 1e-6)]
    cells += ["-" if over is None else f"{step / over * 1e3:.4g}", "-" if over is None else f"{over:.2f}"]
    for baseline in ("dense", "fp16", "powersgd1"):
        times = ratio(baseline, True)
        cells.append("-" if times is None else f"{times:.2f}")
    cells.append(value("timed_steps", 1))
    return f"{scheme:<16}" + "".join(f"{c:>10}" for c in cells)


def plot(records: Sequence[Record], path: Path, model: str = "resnet50") -> None:
    """Step times of `model` as bars, one panel for each network and number of ranks, with the lower bound as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [r for r in records if r["metric"] == "step" and r["baseline"] == "bound" and r["model"] == model]
    panels = sorted({(r["ranks"], r["network"]) for r in steps}, key=lambda p: (p[0], -NETWORKS[p[1]]))
    if not panels:
        return
    schemes = list(
        dict.fromkeys(r["scheme"] for r in steps)
    )  # a place for each, in whichever panels it was run
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4.2 * len(panels), 4.6), sharey=True, squeeze=False
    )
    for axis, (ranks, network) in zip(axes[0], panels, strict=True):
        rows = [r for r in steps if (r["ranks"], r["network"]) == (ranks, network)]
        places = [schemes.index(r["scheme"]) for r in rows]
        colors = [
            "#999999" if r["scheme"] == "none" else "#2b6cb0" if is_ours(r["scheme"]) else "#d69e2e"
            for r in rows
        ]
        axis.barh(places, [r["value"] for r in rows], color=colors)
        for place, r in zip(places, rows, strict=True):
            axis.plot([r["value"] / r["ratio"]] * 2, [place - 0.4, place + 0.4], color="black", linewidth=2)
            axis.text(r["value"] * 1.05, place, f"{r['value'] * 1e3:.0f} ms", va="center", fontsize=7)
        axis.set_yticks(range(len(schemes)), schemes)
        axis.set_xscale("log")
        axis.set_xlim(right=max(r["value"] for r in rows) * 4)
        axis.set_title(f"{ranks} ranks, {network}")
        axis.set_xlabel("step time, s")
    axes[0][0].invert_yaxis()
    figure.suptitle(
        f"{model}: step time by scheme; black line: step without communication + wire bytes / bandwidth"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
