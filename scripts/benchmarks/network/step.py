"""Training steps of DDP with a scheme on a stand-in model: time, our phases, and the bytes that crossed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..harness.figure import INK, WIDTH, color, figure
from ..harness.namespaces import NETWORKS
from ..harness.ranks import all_ranks, check_crossed, interface_bytes, largest, settle
from ..harness.records import Record
from ..harness.table import columns, number
from .models import MODELS, StandIn, numel
from .schemes import AUTO, Attached, attach, is_ours

PHASES = ("select", "exchange", "write_back")
_WARMUP = 2  # DDP lays its buckets anew after the first step
_WARMUP_POWERSGD = 4  # it begins to compress at the third step


@dataclass(frozen=True)
class Case:
    """One scheme on one model. `steps` are timed, fewer (at least 3) when `budget_s` is used up before."""

    scheme: str
    model: str
    density: float = 0.001
    steps: int = 20
    budget_s: float = 60.0
    bucket_mb: float | None = None

    def as_json(self) -> dict[str, Any]:
        """For a job."""
        return asdict(self)


def measure(case: dict[str, Any], rank: int, size: int) -> Iterator[Record]:
    """Yields one record: median step time of the slowest rank, phases and bytes likewise.

    Keys: `step_s` (median of `steps`, each the slowest rank's), `interface_bytes` (sent per rank and step,
    the largest over ranks). For schemes of ours also `select_s`, `exchange_s`, `write_back_s` and
    `counted_bytes`, for `auto` its `plan` (see `decided`) and the density that it chose.
    """
    wanted = Case(**case)
    timed = time_steps(wanted, rank)
    record = {
        "scheme": wanted.scheme,
        "model": wanted.model,
        "numel": numel(MODELS[wanted.model]()),
        "density": wanted.density if is_ours(wanted.scheme) else 1.0,
        "step_s": median(timed.seconds),
        "steps": len(timed.seconds),
        "interface_bytes": timed.interface_bytes,
    }
    if is_ours(wanted.scheme):
        record |= {f"{phase}_s": seconds for phase, seconds in timed.phases.items()}
        record["counted_bytes"] = timed.counted_bytes
    if timed.plan is not None:
        record |= {"density": timed.plan["density"], "plan": timed.plan}
    yield record


@dataclass(frozen=True)
class Timed:
    """What the steps of one case took; see `measure`."""

    seconds: list[float]
    phases: dict[str, float]
    counted_bytes: float
    interface_bytes: float
    plan: dict[str, Any] | None


def time_steps(case: Case, rank: int) -> Timed:
    """Runs the steps of one case on this rank."""
    attached = attach(case.scheme, StandIn(MODELS[case.model](), seed=rank), case.density, case.bucket_mb)
    start = torch.zeros((), requires_grad=True)
    for _ in range(_WARMUP_POWERSGD if case.scheme.startswith("powersgd") else _WARMUP):
        _step(attached.model, start)
    rows = _rows(case, attached, start)
    medians = [sorted(column)[len(column) // 2] for column in zip(*rows, strict=True)]
    plan = decided(attached.state.plan) if case.scheme == AUTO else None
    if attached.state is not None:
        attached.state.close()
    phases = dict(zip(PHASES, medians[1:4], strict=True))
    return Timed([row[0] for row in rows], phases, medians[4], medians[5], plan)


def decided(plan: Any) -> dict[str, Any]:
    """A planner's decision in plain values. `promised_s`: seconds added to a step, by candidate."""
    promised = {f"{p.scheme} at {p.density:g}": p.step_s for p in plan.predictions}
    return {
        "scheme": plan.scheme,
        "density": plan.density,
        "bucket_mb": plan.bucket_mb,
        "reason": plan.reason,
        "promised_s": promised,
    }


def _rows(case: Case, attached: Attached, start: torch.Tensor) -> list[list[float]]:
    """Step by step the largest over ranks of: seconds, three phases, counted bytes, interface bytes."""
    rows: list[list[float]] = []
    began = time.monotonic()
    while len(rows) < case.steps and (len(rows) < 3 or all_ranks(time.monotonic() - began < case.budget_s)):
        settle()
        sent = interface_bytes()
        begun = time.perf_counter()
        _step(attached.model, start)
        seconds = time.perf_counter() - begun
        last = attached.state.stats() if attached.state is not None else None
        if last is not None and last["averaged_by"] == "ddp":
            last = None  # DDP's own all-reduce: nobody counts
        phases = [last["seconds"].get(phase, 0.0) for phase in PHASES] if last else [0.0] * len(PHASES)
        counted = float(last["bytes_sent"]) if last else 0.0
        settle()  # what others still send to us is acknowledged by now, and theirs is out
        rows.append([seconds, *phases, counted, float(interface_bytes() - sent)])
    check_crossed(sum(row[4] for row in rows), sum(row[5] for row in rows), f"{case.scheme} on {case.model}")
    return [largest(row) for row in rows]


def _step(model: Any, start: torch.Tensor) -> None:
    model(start).backward()
    model.zero_grad(set_to_none=True)


def bound_s(record: Record, compute_s: float) -> float:
    """The step without communication plus wire bytes over bandwidth.

    Wire bytes are our own count for our schemes and the interface's for torch's hooks, whose bytes nobody
    counts.
    """
    if record["scheme"] == "none":
        return compute_s
    wire = record.get("counted_bytes") or record["interface_bytes"]
    return compute_s + wire * 8e-6 / NETWORKS[record["network"]]


def starts(records: Sequence[Record]) -> dict[tuple[str, int, str], dict[str, Record]]:
    """Records by (model, ranks, network), then by scheme. Those of one key are of one start."""
    found: dict[tuple[str, int, str], dict[str, Record]] = {}
    for r in records:
        if r["bench"] == "step":
            found.setdefault((r["model"], r["ranks"], r["network"]), {})[r["scheme"]] = r
    return found


def over_bound(record: Record, schemes: dict[str, Record]) -> float:
    """Step over its bound; the step without communication is of the same start."""
    return float(record["step_s"] / bound_s(record, schemes["none"]["step_s"]))


def times_faster(record: Record, schemes: dict[str, Record], than: str) -> float:
    """How many times longer a step by scheme `than` takes in the same start."""
    return float(schemes[than]["step_s"] / record["step_s"])


_HEAD = (
    "scheme",
    "step",
    "select",
    "exchange",
    "write",
    "MB wire",
    "MB count",
    "/bound",
    "dense/",
    "fp16/",
    "psgd1/",
    "n",
)


def table(records: Sequence[Record]) -> str:
    """A line for each scheme, model, number of ranks and network."""
    lines = []
    for (model, ranks, network), schemes in starts(records).items():
        lines += ["", f"{model}, {ranks} ranks, {network} (ms; x/ = how many times slower x is)"]
        lines.append(columns(_HEAD, [_row(record, schemes) for record in schemes.values()]))
        for record in schemes.values():
            if record.get("plan"):
                lines.append(f"{model}, {ranks} ranks, {network}: {plan_text(record['plan'])}")
    return "\n".join(lines)


def _row(record: Record, schemes: dict[str, Record]) -> list[str]:
    def scaled(key: str, factor: float) -> str:
        return number(record[key] * factor) if key in record else "-"

    cells = [record["scheme"], scaled("step_s", 1e3), *(scaled(f"{phase}_s", 1e3) for phase in PHASES)]
    cells += [scaled("interface_bytes", 1e-6), scaled("counted_bytes", 1e-6)]
    cells.append(number(over_bound(record, schemes)) if "none" in schemes else "-")
    for peer in ("dense", "fp16", "powersgd1"):
        cells.append(number(times_faster(record, schemes, peer)) if peer in schemes else "-")
    return [*cells, str(record["steps"])]


def plan_text(plan: dict[str, Any]) -> str:
    """What `auto` decided, in a line."""
    chosen = f"{plan['scheme']} at density {plan['density']:g}, bucket_cap_mb={plan['bucket_mb']:g}"
    return f"auto chose {chosen}: {plan['reason']}"


def plot(records: Sequence[Record], path: Path, model: str = "resnet50") -> None:
    """Step times of `model` as bars, the bound as a black line, a panel for each network and ranks."""
    panels = {
        key: schemes for key, schemes in starts(records).items() if key[0] == model and "none" in schemes
    }
    panels = dict(sorted(panels.items(), key=lambda panel: (panel[0][1], -NETWORKS[panel[0][2]])))
    if not panels:
        return
    places = list(dict.fromkeys(scheme for schemes in panels.values() for scheme in schemes))
    rows = -(-len(panels) // 2)
    columns = min(2, len(panels))
    with figure(path, rows, columns, figsize=(WIDTH, 0.4 + 3.1 * rows), sharey=True) as (drawn, axes):
        for axis in axes.flat[len(panels) :]:
            axis.set_axis_off()
        for axis, ((_, ranks, network), schemes) in zip(axes.flat, panels.items(), strict=False):
            _bars(axis, schemes, places)
            axis.set_title(f"{ranks} ranks, {network}")
        axes[0][0].invert_yaxis()
        drawn.suptitle(
            f"Measured: step time of {model}; marks: step without communication + wire bytes / bandwidth"
        )


def _bars(axis: Any, schemes: dict[str, Record], places: list[str]) -> None:
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=4, foreground="white")]
    compute_s = schemes["none"]["step_s"]
    for scheme, record in schemes.items():
        place, seconds, bound = places.index(scheme), record["step_s"], bound_s(record, compute_s)
        axis.barh(place, seconds, color=color(scheme))
        axis.plot([bound] * 2, [place - 0.45, place + 0.45], color=INK, linewidth=2, path_effects=halo)
        axis.text(seconds * 1.15, place, f"{seconds * 1e3:,.0f} ms", va="center", fontsize=8)
    axis.set_yticks(range(len(places)), places)
    axis.set_xscale("log")
    axis.set_xlim(right=max(record["step_s"] for record in schemes.values()) * 5)
    axis.set_xlabel("step time, s")
    axis.grid(axis="y", visible=False)


def plot_timeline(records: Sequence[Record], path: Path, network: str = "100mbit", ranks: int = 4) -> None:
    """One step of ResNet-50's gradients to scale, with DDP and with the hook; below, the hook's step 50 times larger."""
    schemes = starts(records)["resnet50", ranks, network]
    compute_ms = schemes["none"]["step_s"] * 1e3
    steps = {"DDP": "dense", "top-k": "topk", "gTop-k": "gtopk"}
    whole = schemes["dense"]["step_s"] * 1e3
    with figure(path, 2, 1, figsize=(WIDTH, 3.2)) as (drawn, axes):
        for axis, (left, right) in zip(axes[:, 0], ((0, whole * 1.1), (0, whole * 1.1 / 50)), strict=True):
            for place, (name, scheme) in enumerate(steps.items()):
                step_ms = schemes[scheme]["step_s"] * 1e3
                axis.barh(place, compute_ms, color=color("none"), height=0.6)
                axis.barh(place, step_ms - compute_ms, left=compute_ms, color=color(scheme), height=0.6)
                if step_ms < right:
                    axis.text(step_ms + right / 100, place, f"{step_ms:,.0f} ms", va="center", fontsize=8)
                else:
                    axis.annotate(
                        f"goes on to {step_ms:,.0f} ms", (right, place), (right * 0.97, place), va="center", ha="right",
                        fontsize=8, color="white", clip_on=False,
                    )  # fmt: skip
            axis.set(xlim=(left, right), yticks=range(len(steps)), yticklabels=list(steps))
            axis.invert_yaxis()
            axis.grid(axis="y", visible=False)
        axes[1][0].set_xlabel(
            "ms since the step began: without communication (grey), then what communication adds"
        )
        axes[1][0].set_title("The same, 50 times larger", loc="left")
        drawn.suptitle(f"Measured: one step, ResNet-50, {ranks} ranks, 100 Mbit/s, density 0.001")
