"""`scripts/bench overlap`: 10 buckets sent while backward runs, and after it; one step's trace, drawn.

Needs root. Backward pauses for `--backward-ms` in all, in which the CPU is free, as when a device computes.
Exposed communication is the step's time less that of a hook that sends nothing. "After" is the same hook with
its buckets held back until the last one is there. "Clipped by bucket" and "by model" are the overlapped hook with
`clip_norm` and the norm over each bucket or the whole model. Torch's profiler records rank 0.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from commhooks import ErrorFeedback, SparseState

from ..harness import study
from ..harness.figure import COLORS, WIDTH, figure
from ..harness.namespaces import NETWORKS
from ..harness.ranks import largest, settle
from ..harness.records import Record, one
from .models import StandIn, equal_layers
from .schemes import attach, parts

NORMS = {"clipped by bucket": "bucket", "clipped by model": "model"}
WAYS = ("none", "overlapped", "after", *NORMS)
_CLIP_NORM = 1e6  # it leaves the gradient as it is, and costs what any bound costs
_TRACE = "trace"
_LAYERS, _SIDE = 10, 800
_BUCKET_MB = 2.4  # one layer (2.44 MB) fills a bucket
_COLORS = {
    "backward": COLORS["none"],
    "select": COLORS["randomk"],
    "exchange": COLORS["gtopk"],
    "write_back": COLORS["topk"],
}


def measure(case: dict[str, Any], rank: int, size: int) -> Iterator[Record]:
    """Yields the step times of each way (`seconds`: the slowest rank's), then rank 0's trace of one step.

    `trace` is a list of `(name, begin, end)` in ms.
    """
    for way in WAYS:
        yield case | {"way": way, "seconds": _timed(way, case, rank)}
    yield case | {"way": _TRACE, "trace": _traced(case, rank)}


def _model(way: str, case: dict[str, Any], rank: int) -> tuple[Any, Any]:
    module = StandIn(equal_layers(_LAYERS, _SIDE), rank, case["backward_s"])
    if way != "after":
        memory = ErrorFeedback(clip_norm=_CLIP_NORM, norm_over=NORMS[way]) if way in NORMS else None
        scheme = "none" if way == "none" else case["scheme"]
        attached = attach(scheme, module, case["density"], _BUCKET_MB, memory)
        return attached.model, attached.state
    model = DistributedDataParallel(module, gradient_as_bucket_view=True, bucket_cap_mb=_BUCKET_MB)
    state = SparseState(*parts(case["scheme"], case["density"]))
    model.register_comm_hook((state, []), _held_back)
    return model, state


def _held_back(state, bucket):  # type: ignore[no-untyped-def]  # register_comm_hook looks at annotations
    """The hook of ours, but nothing is submitted before the last bucket is there."""
    ours, waiting = state
    future = torch.futures.Future()
    parameters = tuple(bucket.parameters())
    waiting.append((future, bucket.buffer(), bucket.index(), parameters, bucket.is_last()))
    if bucket.is_last():
        for held, buffer, index, keys, last in waiting:
            ours.submit(buffer, index, keys, last).then(lambda done, held=held: held.set_result(done.value()))
        waiting.clear()
    return future


def _timed(way: str, case: dict[str, Any], rank: int) -> list[float]:
    """Step times of the slowest rank."""
    model, state = _model(way, case, rank)
    start = torch.zeros((), requires_grad=True)
    seconds = []
    for _ in range(case["steps"] + 3):
        settle()
        begun = time.perf_counter()
        model(start).backward()
        seconds.append(time.perf_counter() - begun)
        model.zero_grad(set_to_none=True)
    if state is not None:
        state.close()
    return largest(seconds[3:])


def _traced(case: dict[str, Any], rank: int) -> list[tuple[str, float, float]]:
    """`(name, begin, end)` in ms of one overlapped step on this rank, by torch's profiler."""
    model, state = _model("overlapped", case, rank)
    start = torch.zeros((), requires_grad=True)
    # the hook works on its own thread
    config = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    for _ in range(3):
        model(start).backward()
        model.zero_grad(set_to_none=True)
    settle()
    with profile(activities=[ProfilerActivity.CPU], experimental_config=config) as profiler:
        model(start).backward()
    ours = {f"commhooks.{phase}": phase for phase in ("select", "exchange", "write_back")}
    names = {"_LayerBackward": "backward", **ours}
    events = [e for e in profiler.events() if e.name in names]
    first = min(e.time_range.start for e in events)
    state.close()
    return [
        (names[e.name], (e.time_range.start - first) / 1e3, (e.time_range.end - first) / 1e3) for e in events
    ]


def exposed_s(records: Sequence[Record], way: str) -> float:
    """Median step of a way less that of the hook that sends nothing."""
    return median(one(records, way=way)["seconds"]) - median(one(records, way="none")["seconds"])


def table(records: Sequence[Record]) -> str:
    """What each way exposes, in a line, and the share of what is exposed after backward."""
    found = {way: exposed_s(records, way) for way in WAYS if way != "none"}
    return "exposed: " + ", ".join(
        f"{way} {seconds * 1e3:.1f} ms (ratio {seconds / found['after']:.2f})"
        for way, seconds in found.items()
    )


def plot(records: Sequence[Record], path: Path) -> None:
    """The traced step: backward above, the hook's thread below."""
    with figure(path, figsize=(WIDTH, 2.2)) as (_, axes):
        axis = axes[0][0]
        for name, begin, end in one(records, way=_TRACE)["trace"]:
            row = 1 if name == "backward" else 0
            axis.barh(row, end - begin, left=begin, color=_COLORS[name], lw=0)
        axis.set_yticks([0, 1], ["hook's thread", "backward"])
        axis.set_xlabel("ms since backward began")
        axis.grid(axis="y", visible=False)
        axis.set_title("Measured: one step of rank 0, 4 ranks, 100 Mbit/s, 10 buckets", pad=20)
        for name, shade in _COLORS.items():
            axis.barh(0, 0, color=shade, label=name)
        axis.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 0.96))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `scripts/bench overlap`."""
    study.add_arguments(parser)
    parser.add_argument("--network", default="100mbit", choices=NETWORKS)
    parser.add_argument("--scheme", default="gtopk")
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--backward-ms", type=float, default=500.0)
    parser.add_argument("--steps", type=int, default=20)


def run(options: argparse.Namespace) -> int:
    """Measures on 4 ranks, writes and draws."""
    case = {name: getattr(options, name) for name in ("scheme", "density", "steps")}
    case["backward_s"] = options.backward_ms * 1e-3
    job = study.Job("overlap", 4, options.network, [case], 300.0)
    return study.run([job], options, table, plot)
