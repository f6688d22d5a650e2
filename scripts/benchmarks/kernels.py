"""`scripts/bench kernels`: the kernels beside `r += g`, torch, numpy and memcpy; here those of the CPU.

    scripts/bench kernels --quick               # 1M and 6.55M elements, 5 repetitions: under a minute
    scripts/bench kernels --json FILE           # everything: some minutes, 3 GB of memory
    scripts/bench kernels --device cuda         # those of the GPU: kernels_cuda.py

Every kernel's result is compared with its reference before it is timed. A kernel and its baseline run in turn, and the
medians of all repetitions are compared, so that a ratio belongs to one run on one machine in one state.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.kernels_data import DATA, Gradients, RealRun, train
from benchmarks.kernels_records import Record, Records
from torch import Tensor

from commhooks.native import abi, ops, reference
from commhooks.native.fused import Fused, Selected

Call = Callable[[], object]
_SIZES = (1_000_000, 6_550_000, 25_000_000, 100_000_000)
_DENSITIES = (0.001, 0.01)
_MERGED = (25_000, 250_000)
#: Beyond this the torch pipeline takes seconds, and is repeated three times only.
_SLOW_TORCH = 10_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `scripts/bench kernels`."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records there")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="whose kernels")
    parser.add_argument("--cub", type=Path, metavar="FILE", help="cuda: cub_rival.cu as a shared library")
    parser.add_argument(
        "--quick", action="store_true", help="1M and 6.55M elements; on the CPU 5 repetitions"
    )
    parser.add_argument("--sizes", type=int, nargs="+", help="elements")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="one thread, and its CPU time instead of the wall clock: for a machine that is busy with other things",
    )
    parser.add_argument(
        "--isa", help="instruction set of the library (scalar, avx2, avx512, neon); default: the best"
    )


class Bench(Records):
    """Times pairs and collects records."""

    def __init__(self, repeats: int, threads: int, cpu_time: bool = False, file: Path | None = None) -> None:
        super().__init__("cpu", threads, file)
        self.repeats = repeats
        self._clock = time.thread_time if cpu_time else time.perf_counter
        self._metric = "cpu_time" if cpu_time else "time"

    def compare(
        self, labels: Record, kernel: Call, baselines: dict[str, Call], *, between: Call = lambda: None
    ) -> None:
        """Times `kernel` and the baselines in turn; `between` runs untimed before each turn."""
        calls = {"": kernel, **baselines}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for call in calls.values():
            between()
            call()
        for turn in range(self.repeats):
            between()
            for name, call in calls.items():
                if name == "torch" and labels["numel"] > _SLOW_TORCH and turn >= 3:
                    continue
                start = self._clock()
                call()
                times[name].append(self._clock() - start)
        medians = {name: statistics.median(taken) * 1e3 for name, taken in times.items()}
        self.time(labels, medians.pop(""), medians, metric=self._metric)


def torch_pipeline(grad: Tensor, residual: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What the kernel replaces: add_, abs, topk, gather, scatter."""
    residual.add_(grad)
    indices = residual.abs().topk(k, sorted=False).indices
    values = residual.gather(0, indices)
    residual.scatter_(0, indices, 0.0)
    return values, indices


def check_selection(
    call: Callable[[Fused], Selected], oracle: Callable[[Fused], Selected], grad: Tensor
) -> None:
    """Compares all bits on up to 6.55M elements (what the reference manages in seconds)."""
    part = grad[:6_550_000].clone()
    memories = [
        torch.randn(part.numel(), generator=torch.Generator().manual_seed(1)) * part.std() for _ in "ab"
    ]
    got, want = call(Fused(part, memories[0])), oracle(Fused(part, memories[1]))
    same = torch.equal(got.indices, want.indices) and torch.equal(got.values, want.values)
    if not (same and torch.equal(*memories)):
        raise AssertionError("a kernel disagrees with its reference")


def bench_selections(bench: Bench, data: str, numel: int, density: float, run: RealRun | None) -> None:
    """select_topk, select_threshold, select_indices on one gradient, in the steady state of error feedback."""
    gradients = Gradients(data, numel, run)
    grad, k = gradients.buffer, max(1, int(numel * density))
    residual, plain, other = torch.zeros(numel), torch.zeros(numel), torch.zeros(numel)
    name = data if run is None else run.name
    fused, labels = Fused(grad, residual), {"data": name, "numel": numel, "density": density}
    misses: list[int] = []

    def topk() -> None:
        misses.append(int(ops.select_topk(fused, k, seed=len(misses), threads=bench.threads).report[2]))

    small_k = max(1, int(min(numel, 6_550_000) * density))
    check_selection(
        lambda f: ops.select_topk(f, small_k, threads=bench.threads),
        lambda f: reference.select_topk(f, small_k),
        grad,
    )
    for _ in range(3):
        topk()
    baselines: dict[str, Call] = {"r+=g": lambda: plain.add_(grad)}
    if data == "gaussian":
        baselines["torch"] = lambda: torch_pipeline(grad, other, k)
    bench.compare({"kernel": "select_topk", **labels}, topk, baselines, between=gradients.next)
    hit = {"kernel": "select_topk", **labels, "metric": "hit_rate", "unit": "1"}
    bench.add(hit, sum(m == 0 for m in misses) / len(misses))
    if data != "gaussian":
        return
    baselines.pop("torch")
    threshold = ops.sample_threshold(fused, k)
    check_selection(
        lambda f: ops.select_threshold(f, threshold, small_k, threads=bench.threads),
        lambda f: reference.select_threshold(f, threshold, small_k),
        grad,
    )
    bench.compare(
        {"kernel": "select_threshold", **labels},
        lambda: ops.select_threshold(fused, threshold, k, threads=bench.threads),
        baselines,
    )
    indices = ops.random_indices(0, 0, 0, numel, k)
    small = indices[indices < min(numel, 6_550_000)]
    check_selection(
        lambda f: ops.select_indices(f, small, threads=bench.threads),
        lambda f: reference.select_indices(f, small),
        grad,
    )
    bench.compare(
        {"kernel": "select_indices", **labels},
        lambda: ops.select_indices(fused, indices, threads=bench.threads),
        baselines,
    )


def bench_misses(bench: Bench, numel: int, density: float) -> None:
    """Two data sets on which no guess can hold: all magnitudes but k / 2 equal."""
    grad = torch.full((numel,), 1e-3)
    k = max(1, int(numel * density))
    grad[:: 2 * numel // k] = 1.0
    residual, plain = torch.zeros(numel), torch.zeros(numel)
    fused = Fused(grad, residual)

    def missed() -> None:
        if int(ops.select_topk(fused, k, threads=bench.threads).report[2]) == 0:
            raise AssertionError("the guess held where it was meant to fail")

    labels = {"kernel": "select_topk", "data": "missed", "numel": numel, "density": density}
    bench.compare(labels, missed, {"r+=g": lambda: plain.add_(grad)}, between=residual.zero_)


def bench_sparse(bench: Bench, numel: int, density: float) -> None:
    """write_back, scatter_add and random_indices."""
    k = max(1, int(numel * density))
    indices = ops.random_indices(1, 2, 3, numel, k)
    values = torch.randn(k)
    out, dense, grad = torch.empty(numel), torch.zeros(numel), torch.ones(numel)
    long = indices.long()
    labels = {"data": "gaussian", "numel": numel, "density": density}
    ops.write_back(out, values, indices, 0.25, threads=bench.threads)
    if not torch.equal(out, dense.index_add(0, long, values * 0.25)):
        raise AssertionError("write_back disagrees with torch")
    bench.compare(
        {"kernel": "write_back", **labels},
        lambda: ops.write_back(out, values, indices, 0.25, threads=bench.threads),
        {
            "r+=g": lambda: dense.add_(grad),
            "torch": lambda: out.zero_().index_add_(0, long, values, alpha=0.25),
        },
    )
    bench.compare(
        {"kernel": "scatter_add", **labels},
        lambda: ops.scatter_add(dense, values, indices),
        {"torch": lambda: dense.index_add_(0, long, values)},
    )
    bench.compare(
        {"kernel": "random_indices", **labels},
        lambda: ops.random_indices(1, 2, 3, numel, k),
        {"torch": lambda: torch.randperm(numel, dtype=torch.int32)[:k].sort()},
    )


def merge_rivals(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], k: int) -> dict[str, Call]:
    """A copy of the inputs, and the same merge by numpy and by torch."""
    parts = [*a, *b]
    copies = [torch.empty_like(part) for part in parts]
    arrays = [part.numpy() for part in parts]

    def memcpy() -> None:
        for part, room in zip(parts, copies, strict=True):
            ctypes.memmove(room.data_ptr(), part.data_ptr(), part.nbytes)

    def by_numpy() -> tuple[np.ndarray[Any, Any], ...]:
        union = np.union1d(arrays[1], arrays[3])
        total = np.zeros(union.size, np.float32)
        total[np.searchsorted(union, arrays[1])] += arrays[0]
        total[np.searchsorted(union, arrays[3])] += arrays[2]
        best = np.sort(np.argpartition(-np.abs(total), k)[:k])
        return total[best], union[best], np.isin(arrays[1], union[best]), np.isin(arrays[3], union[best])

    def by_torch() -> tuple[Tensor, ...]:
        union, places = torch.cat((a[1], b[1])).unique(return_inverse=True)
        total = torch.zeros(union.numel()).index_add_(0, places, torch.cat((a[0], b[0])))
        best = total.abs().topk(k, sorted=False).indices.sort().values
        keep = torch.zeros(union.numel(), dtype=torch.bool).index_fill_(0, best, True)
        return total[best], union[best], keep[places[: a[1].numel()]], keep[places[a[1].numel() :]]

    return {"memcpy": memcpy, "numpy": by_numpy, "torch": by_torch}


def bench_merge(bench: Bench, k: int, density: float) -> None:
    """gTop-k's inner step on two selections of k pairs."""
    numel = int(k / density)
    generator = torch.Generator().manual_seed(k)
    a, b = (
        (torch.randn(k, generator=generator), ops.random_indices(7, step, 0, numel, k)) for step in range(2)
    )
    for got, want in zip(ops.merge_topk(*a, *b, k), reference.merge_topk(*a, *b, k), strict=True):
        if not torch.equal(got, want):
            raise AssertionError("merge_topk disagrees with its reference")
    labels = {"kernel": "merge_topk", "data": "gaussian", "numel": numel, "density": density}
    bench.compare(labels, lambda: ops.merge_topk(*a, *b, k), merge_rivals(a, b, k))


def cases(options: argparse.Namespace) -> Iterator[tuple[int, float]]:
    """Sizes and densities."""
    for numel in options.sizes or (_SIZES[:2] if options.quick else _SIZES):
        for density in _DENSITIES:
            yield numel, density


def run(options: argparse.Namespace) -> int:
    """Measures everything; returns the exit status."""
    if options.device == "cuda":
        from benchmarks import kernels_cuda  # noqa: PLC0415

        return kernels_cuda.run(options)
    threads = 1 if options.cpu_time else options.threads
    torch.set_num_threads(threads)
    if options.isa:
        abi.use_isa(options.isa)
    bench = Bench(5 if options.quick else options.repeats, threads, options.cpu_time, options.json)
    for name, text in abi.describe().items():
        print(f"# {name}: {text}")
    print(f"# load {os.getloadavg()[0]:.1f}, {bench.repeats} repetitions, medians; ratio = kernel / baseline")
    runs = {density: train(density) for density in _DENSITIES}
    for density, trained in runs.items():
        labels = {
            "kernel": "select_topk",
            "data": trained.name,
            "numel": trained.gradients[0].numel(),
            "density": density,
        }
        bench.add({**labels, "metric": "hit_rate", "unit": "1"}, trained.hits / trained.steps)
    for k in _MERGED:
        for density in _DENSITIES:
            bench_merge(bench, k, density)
    for numel, density in cases(options):
        for data in DATA:
            bench_selections(bench, data, numel, density, runs[density] if data == "real" else None)
        bench_misses(bench, numel, density)
        bench_sparse(bench, numel, density)
        bench.save()
    return 0
