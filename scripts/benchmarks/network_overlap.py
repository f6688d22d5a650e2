"""Overlap: 10 buckets of one model, sent while backward runs and after it; and a profiler trace of one step, drawn.

    python scripts/benchmarks/network_overlap.py --json docs/performance/network-overlap.json --plot docs/performance/network-overlap.png

Run as root from the checkout. Backward pauses for `--backward-ms` in all, in which the CPU is free, as when a device
computes. Exposed communication is the step's time less that of a hook that sends nothing. "After backward" is the same
hook with its buckets held back until the last one is there. Torch's profiler records rank 0.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from benchmarks.namespaces import NETWORKS, Network, why_not
from benchmarks.network_limits import verify

_LAYERS, _SIDE = 10, 800
_BUCKET_MB = 2.4  # one layer (2.44 MB) fills a bucket
_COLORS = {"backward": "#999999", "select": "#2f855a", "exchange": "#2b6cb0", "write_back": "#d69e2e"}


def rank_main(job_file: Path, out: Path) -> None:
    """On a rank: step times of the three ways, then a traced step."""
    from benchmarks.network_launch import join

    rank, _ = join()
    (case,) = json.loads(job_file.read_text())
    found = {name: _timed(name, case, rank) for name in ("none", "overlapped", "after")}
    trace = _traced(case, rank)
    if rank == 0:
        out.write_text(json.dumps(case | {"seconds": found, "trace": trace}) + "\n")


def _model(name: str, case: dict[str, Any], rank: int) -> tuple[Any, Any]:
    from benchmarks.network_models import StandIn, equal_layers
    from benchmarks.network_schemes import attach, make_state
    from torch.nn.parallel import DistributedDataParallel

    module = StandIn(equal_layers(_LAYERS, _SIDE), rank, case["backward_s"])
    if name != "after":
        attached = attach("none" if name == "none" else case["scheme"], module, case["density"], _BUCKET_MB)
        return attached.model, attached.state
    model = DistributedDataParallel(module, gradient_as_bucket_view=True, bucket_cap_mb=_BUCKET_MB)
    state = make_state(case["scheme"], case["density"])
    model.register_comm_hook((state, []), _held_back)
    return model, state


def _held_back(state, bucket):  # type: ignore[no-untyped-def]  # register_comm_hook looks at annotations
    """The hook of ours, but nothing is submitted before the last bucket is there."""
    import torch

    ours, waiting = state
    future = torch.futures.Future()
    parameters = tuple(bucket.parameters())
    waiting.append((future, bucket.buffer(), bucket.index(), parameters, bucket.is_last()))
    if bucket.is_last():
        for held, buffer, index, keys, last in waiting:
            ours.submit(buffer, index, keys, last).then(lambda done, held=held: held.set_result(done.value()))
        waiting.clear()
    return future


def _timed(name: str, case: dict[str, Any], rank: int) -> list[float]:
    """Step times of the slowest rank."""
    import torch
    import torch.distributed as dist

    model, state = _model(name, case, rank)
    start = torch.zeros((), requires_grad=True)
    seconds = []
    for _ in range(case["steps"] + 3):
        dist.barrier()
        begun = time.perf_counter()
        model(start).backward()
        seconds.append(time.perf_counter() - begun)
        model.zero_grad(set_to_none=True)
    table = torch.tensor(seconds[3:], dtype=torch.float64)
    dist.all_reduce(table, op=dist.ReduceOp.MAX)
    if state is not None:
        state.close()
    return table.tolist()


def _traced(case: dict[str, Any], rank: int) -> list[tuple[str, float, float]]:
    """``(name, begin, end)`` in ms of one overlapped step on this rank, by torch's profiler."""
    import torch
    import torch.distributed as dist
    from torch.profiler import ProfilerActivity, profile

    model, state = _model("overlapped", case, rank)
    start = torch.zeros((), requires_grad=True)
    config = torch._C._profiler._ExperimentalConfig(
        profile_all_threads=True
    )  # the hook works on its own thread
    for _ in range(3):
        model(start).backward()
        model.zero_grad(set_to_none=True)
    dist.barrier()
    with profile(activities=[ProfilerActivity.CPU], experimental_config=config) as profiler:
        model(start).backward()
    names = {
        "_LayerBackward": "backward",
        **{f"commhooks.{p}": p for p in ("select", "exchange", "write_back")},
    }
    events = [e for e in profiler.events() if e.name in names]
    first = min(e.time_range.start for e in events)
    state.close()
    return [
        (names[e.name], (e.time_range.start - first) / 1e3, (e.time_range.end - first) / 1e3) for e in events
    ]


def plot(found: dict[str, Any], path: Path) -> None:
    """The traced step: backward above, the hook's thread below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(11, 2.8))
    for name, begin, end in found["trace"]:
        axis.barh(
            1 if name == "backward" else 0,
            end - begin,
            left=begin,
            color=_COLORS[name],
            edgecolor="white",
            lw=0.3,
        )
    axis.set_yticks([0, 1], ["hook's thread", "backward"])
    axis.set_xlabel("ms")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=c) for c in _COLORS.values()]
    axis.legend(handles, list(_COLORS), ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.3), fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    """Measures on 4 ranks, writes and draws."""
    if len(sys.argv) == 3 and sys.argv[1].endswith("job.json"):
        rank_main(Path(sys.argv[1]), Path(sys.argv[2]))
        return 0
    from statistics import median

    from benchmarks.network import run_job

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--network", default="100mbit", choices=NETWORKS)
    parser.add_argument("--scheme", default="gtopk")
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--backward-ms", type=float, default=500.0)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    reason = why_not()
    if reason is not None:
        print(reason, file=sys.stderr)
        return 2
    case = {k: getattr(options, k) for k in ("network", "scheme", "density", "steps")}
    case["backward_s"] = options.backward_ms * 1e-3
    with Network(4, NETWORKS[options.network]) as network:
        verify(network)
        found, error = run_job(network, "network_overlap.py", [case], 300)
    if error is not None:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    steps = {name: median(seconds) for name, seconds in found[0]["seconds"].items()}
    exposed = {name: steps[name] - steps["none"] for name in ("overlapped", "after")}
    ratio = exposed["overlapped"] / exposed["after"]
    print(f"exposed: overlapped {exposed['overlapped'] * 1e3:.1f} ms, after backward {exposed['after'] * 1e3:.1f} ms, "
          f"ratio {ratio:.2f}")  # fmt: skip
    options.json.write_text(json.dumps(found[0] | {"exposed_s": exposed, "ratio": ratio}, indent=1) + "\n")
    if options.plot:
        plot(found[0], options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
