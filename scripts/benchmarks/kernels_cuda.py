"""Benchmark of the CUDA kernels: seconds on the device, medians of 20, against copies, torch and CUB.

    python scripts/benchmarks/kernels_cuda.py [--json FILE] [--quick] [--cub FILE.so] [--real GRADIENTS.pt]

Times are taken with CUDA events behind a kernel that keeps the device busy while Python enqueues, so that only work of
the device counts. Inputs rotate, so that a bucket is not found in the cache of the device. Each selection is checked
against torch before it is timed. Records follow one shape: bench, kernel, data, numel, density, device, threads,
metric, unit, value, baseline, ratio (value / that of the baseline).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from commhooks.native import cuda  # noqa: E402
from commhooks.native.fused import Fused  # noqa: E402

SIZES = (1_000_000, 6_553_600, 25_000_000, 100_000_000)
DENSITIES = (0.001, 0.01)
REPEATS = 20
ROTATE_BYTES = 256 * 2**20  # well beyond the cache of any device
Record = dict[str, Any]


def seconds_of(call: Callable[[int], object], repeats: int = REPEATS) -> float:
    """Median seconds on the device of ``call(turn)``."""
    for turn in range(3):
        call(turn)
    times = []
    for turn in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(2_000_000)  # about a millisecond, while Python enqueues
        begin.record()
        call(turn)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def data_of(kind: str, numel: int, count: int, real: Tensor | None) -> list[Tensor]:
    """``count`` gradients on the device."""
    generator = torch.Generator("cuda").manual_seed(0)
    gradients = []
    for turn in range(count):
        noise = torch.randn(numel, device="cuda", generator=generator)
        if kind == "heavy":
            noise /= torch.rand(numel, device="cuda", generator=generator).clamp_min_(1e-4)
        elif kind == "real" and real is not None:
            flat = real.reshape(-1).float().roll(turn * 977)
            noise = flat.repeat(-(-numel // flat.numel()))[:numel].cuda()
        gradients.append(noise)
    return gradients


def check(gradient: Tensor, k: int) -> None:
    """Raises unless select_topk takes out what torch.topk takes out."""
    residual = 0.1 * gradient.roll(1)
    corrected = residual + gradient
    got = cuda.select_topk(Fused(gradient, residual), k)
    expected = torch.topk(corrected.abs(), k, sorted=False).values
    same = torch.equal(got.values.abs().sort().values, expected.sort().values)
    indices = got.indices.long()
    if not (same and torch.equal(corrected[indices], got.values) and bool((indices.diff() > 0).all())):
        raise AssertionError(f"select_topk differs from torch.topk at numel {gradient.numel()}, k {k}")


def torch_pipeline(residual: Tensor, gradient: Tensor, k: int) -> None:
    corrected = residual.add_(gradient)
    indices = torch.topk(corrected.abs(), k, sorted=False).indices
    corrected.gather(0, indices)
    corrected.scatter_(0, indices, 0.0)


class Cub:
    """The rival of ``cub_rival.cu``."""

    def __init__(self, path: Path) -> None:
        self.call = ctypes.CDLL(str(path)).cub_rival
        pointer = ctypes.c_void_p
        self.call.argtypes = [pointer, pointer, ctypes.c_int64, ctypes.c_int64, *[pointer] * 6]

    def run(self, gradient: Tensor, residual: Tensor, k: int, kept: dict[int, Tensor]) -> None:
        size = ctypes.c_size_t(0 if k not in kept else kept[k].numel())
        out = torch.empty(3, k, dtype=torch.int32, device="cuda")
        stream = torch.cuda.current_stream().cuda_stream
        arguments = [
            gradient.data_ptr(),
            residual.data_ptr(),
            gradient.numel(),
            k,
            *(row.data_ptr() for row in out),
        ]
        if k not in kept:
            self._checked(*arguments, None, ctypes.addressof(size), stream)
            kept[k] = torch.empty(size.value, dtype=torch.uint8, device="cuda")
        self._checked(*arguments, kept[k].data_ptr(), ctypes.addressof(size), stream)

    def _checked(self, *arguments: object) -> None:
        status = self.call(*arguments)
        if status != 0:
            raise RuntimeError(f"cub_rival: CUDA error {status}")


class Table:
    """Collects records, one per baseline."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def add(
        self,
        kernel: str,
        data: str,
        numel: int,
        density: float,
        value: float,
        baselines: dict[str, float],
        **more: int,
    ) -> None:
        for baseline, other in baselines.items():
            self.records.append(
                {
                    "bench": "kernels",
                    "kernel": kernel,
                    "data": data,
                    "numel": numel,
                    "density": density,
                    "device": "cuda",
                    "threads": 0,
                    "metric": "time",
                    "unit": "s",
                    "value": value,
                    "baseline": baseline,
                    "ratio": value / other,
                    **more,
                }
            )
            line = f"{kernel:>18} {data:>9} {numel:>11} {density:>6.3g} {value * 1e6:>10.1f} us"
            print(f"{line} {value / other:>7.2f} x {baseline}", flush=True)


def settle(gradients: list[Tensor], residuals: list[Tensor], k: int) -> int:
    """Steps with error feedback until the residuals are in their stride; the number of misses among them."""
    misses = torch.zeros((), dtype=torch.int64, device="cuda")
    for residual in residuals:
        residual.zero_()
    for turn in range(4 * len(gradients)):
        fused = Fused(gradients[turn % len(gradients)], residuals[turn % len(gradients)])
        misses += cuda.select_topk(fused, k, seed=turn).report[2]
    return int(misses)


def selections(
    table: Table, kind: str, numel: int, densities: Sequence[float], cub: Cub | None, real: Any
) -> None:
    """select_topk and its rivals on one size."""
    count = max(2, min(16, -(-ROTATE_BYTES // (8 * numel))))
    gradients = data_of(kind, numel, count, real)
    residuals = [torch.zeros(numel, device="cuda") for _ in range(count)]
    # 12 bytes an element (read r and g, write r) at the speed of a copy, which moves 8.
    copy = seconds_of(lambda turn: residuals[turn % count].copy_(gradients[turn % count])) * 12 / 8
    add = seconds_of(lambda turn: residuals[turn % count].add_(gradients[turn % count]))
    for density in densities:
        k = max(1, round(density * numel))
        check(gradients[0], k)
        missed = settle(gradients, residuals, k)
        baselines = {"memcpy": copy, "r+=g": add}
        time = seconds_of(
            lambda turn, k=k: cuda.select_topk(
                Fused(gradients[turn % count], residuals[turn % count]), k, seed=turn
            )
        )
        baselines.update(rivals(gradients, residuals, k, cub))
        table.add("select_topk", kind, numel, density, time, baselines, misses=missed)
        same = torch.ones_like(gradients[0])
        time = seconds_of(
            lambda turn, k=k, same=same: cuda.select_topk(Fused(same, residuals[0].zero_()), k), 5
        )
        table.add("select_topk", "all equal", numel, density, time, {"r+=g": add}, misses=1)
        writes(table, kind, numel, density, k, copy)


def rivals(gradients: list[Tensor], residuals: list[Tensor], k: int, cub: Cub | None) -> dict[str, float]:
    """Seconds of torch.topk alone, of torch's pipeline, and of CUB with its passes."""
    count = len(gradients)
    alone = [residual.abs() for residual in residuals[:2]]
    found = {
        "torch.topk": seconds_of(lambda turn: torch.topk(alone[turn % 2], k, sorted=False), 5),
        "torch": seconds_of(
            lambda turn: torch_pipeline(residuals[turn % count], gradients[turn % count], k), 5
        ),
    }
    if cub is not None:
        kept: dict[int, Tensor] = {}
        found["cub"] = seconds_of(
            lambda turn: cub.run(gradients[turn % count], residuals[turn % count], k, kept)
        )
    return found


def writes(table: Table, kind: str, numel: int, density: float, k: int, copy: float) -> None:
    """The write-back, a line of its own, and random_indices."""
    out = torch.empty(numel, device="cuda")
    indices = cuda.random_indices(0, 0, 0, numel, k, out.device)
    pairs = (torch.randn(1, k, device="cuda"), indices[None])
    time = seconds_of(lambda turn: cuda.write_back(out, *pairs))
    table.add("write_back", kind, numel, density, time, {"memcpy": copy * 4 / 12})
    time = seconds_of(lambda turn: cuda.random_indices(0, turn, 0, numel, k, out.device))
    table.add("random_indices", kind, numel, density, time, {"memcpy": copy})


def merges(table: Table) -> None:
    for k in (25_000, 250_000):
        merge(table, 25_000_000, k)


def merge(table: Table, numel: int, k: int) -> None:
    indices = [cuda.random_indices(seed, 0, 0, numel, k, torch.device("cuda")) for seed in range(2)]
    values = [torch.randn(k, device="cuda") for _ in range(2)]
    both = torch.cat(values), torch.cat(indices)
    into = [torch.empty_like(tensor) for tensor in both]

    def operators(turn: int) -> None:
        unique, where = torch.unique(both[1], return_inverse=True)
        total = torch.zeros(unique.numel(), device="cuda").index_add_(0, where, both[0])
        unique[torch.topk(total.abs(), k, sorted=False).indices.sort().values]

    copy = seconds_of(lambda turn: [a.copy_(b) for a, b in zip(into, both, strict=True)])
    baselines = {"memcpy": copy, "torch": seconds_of(operators, 5)}
    time = seconds_of(lambda turn: cuda.merge_topk(values[0], indices[0], values[1], indices[1], k))
    table.add("merge_topk", "gaussian", numel, k / numel, time, baselines)


def run(*, quick: bool = False, cub: Path | None = None, real: Path | None = None) -> list[Record]:
    """All figures; needs a GPU and the CUDA library."""
    table = Table()
    rival = Cub(cub) if cub is not None else None
    saved = torch.load(real, weights_only=True) if real is not None else None
    kinds = ["gaussian", "heavy"] + (["real"] if saved is not None else [])
    for numel in SIZES[:2] if quick else SIZES:
        for kind in kinds:
            selections(table, kind, numel, DENSITIES, rival, saved)
            torch.cuda.empty_cache()
    merges(table)
    return table.records


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark of the CUDA kernels.")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="the two smaller sizes only")
    parser.add_argument("--cub", type=Path, help="cub_rival.cu as a shared library")
    parser.add_argument("--real", type=Path, help="a tensor of gradients saved with torch.save")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was measured", file=sys.stderr)
        raise SystemExit(3)
    records = run(quick=options.quick, cub=options.cub, real=options.real)
    if options.json is not None:
        options.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
