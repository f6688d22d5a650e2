"""Where a selection's time goes: the device's time of each of its kernels by torch's profiler, and the gaps between them.

With ``--once`` nothing is profiled here: after a warm-up each case makes one call inside the range that ``ncu
--profile-from-start off`` looks at.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from benchmarks.kernels.cuda_tools import Operands, segments_of

from commhooks.native import cuda
from commhooks.native.fused import Fused
from gpu.programs import place

CASES = {  # elements, density, segments
    "6.55M, 0.1 %, segments": (6_553_600, 0.001, True),
    "25M, 0.1 %": (25_000_000, 0.001, False),
    "100M, 0.1 %": (100_000_000, 0.001, False),
    "100M, 1 %": (100_000_000, 0.01, False),
}
PARTS = ("Memset", "sample_kernel", "pass_kernel", "finish_kernel")  # in the profiler's names
CALLS = 20


def parts_of(rows: Any, calls: int) -> dict[str, float]:
    """Microseconds a call of each part, out of the profiler's rows of all calls (other kernels under "other")."""
    result: dict[str, float] = {}
    for row in rows:
        total = float(getattr(row, "self_device_time_total", getattr(row, "self_cuda_time_total", 0.0)))
        if total > 0.0:
            name = next((part for part in PARTS if part in row.key), "other")
            short = name.removesuffix("_kernel").lower()
            result[short] = result.get(short, 0.0) + total / calls
    return {name: round(us, 2) for name, us in result.items()}


def case(here: place.Place, numel: int, density: float, with_segments: bool) -> Any:
    """A function that selects, in the steady state of error feedback."""
    operands = Operands.make("gaussian", numel, here.device)
    segments = segments_of(numel, here.device) if with_segments else None
    k = max(1, round(density * numel))

    def call(turn: int) -> None:
        here_ = turn % operands.count
        cuda.select_topk(
            Fused(operands.gradients[here_], operands.residuals[here_], segments=segments), k, seed=turn
        )

    for turn in range(here.pick(4 * operands.count, 1)):
        call(turn)
    here.synchronize()
    return call


def microseconds(here: place.Place, call: Any, calls: int) -> float:
    """Of one call among many queued ones, by events: with the gaps between kernels, without waiting for Python."""
    here.busy(20_000_000)
    begin = here.instant()
    for turn in range(calls):
        call(turn)
    end = here.instant()
    here.synchronize()
    return 1e3 * here.ms_between(begin, end) / calls


def profiled(here: place.Place, call: Any, calls: int) -> tuple[dict[str, float], str]:
    """The parts, and the profiler's table for the log."""
    kind = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kind.CPU if here.dry else kind.CUDA]) as profile:
        for turn in range(calls):
            call(turn)
        here.synchronize()
    rows = profile.key_averages()
    return parts_of(rows, calls), rows.table(row_limit=12)


@contextlib.contextmanager
def seen_by_ncu(here: place.Place) -> Any:
    if not here.dry:
        torch.cuda.profiler.start()
    yield
    here.synchronize()
    if not here.dry:
        torch.cuda.profiler.stop()


def measured(here: place.Place, name: str, numel: int, density: float, call: Any) -> None:
    """Prints and keeps a case's time, parts and gaps."""
    calls = here.pick(CALLS, 2)
    total = microseconds(here, call, calls)
    parts, table = profiled(here, call, calls)
    gaps = round(total - sum(parts.values()), 2)
    print(f"{name}: {total:.1f} us a call: {parts}, between them {gaps}\n{table}")
    here.keep(name, {"numel": numel, "density": density, "us": round(total, 2), "parts": parts, "gaps": gaps})


def main() -> None:
    once = "--once"
    here, options = place.begin(__doc__ or "", lambda parser: parser.add_argument(once, action="store_true"))
    for name, (numel, density, with_segments) in CASES.items():
        place.step(name)
        numel = here.pick(numel, 40_000)
        call = case(here, numel, density, with_segments)
        if options.once or here.dry:
            with seen_by_ncu(here):
                call(0)
        if not options.once:
            measured(here, name, numel, density, call)
        del call
        if not here.dry:
            torch.cuda.empty_cache()
    print(f"{len(CASES)} cases, {'one call each' if options.once else f'{CALLS} calls each'}")


if __name__ == "__main__":
    main()
