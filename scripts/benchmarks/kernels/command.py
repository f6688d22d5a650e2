"""`scripts/bench kernels`: the kernels beside `r += g`, `r *= a`, torch, numpy and memcpy.

    scripts/bench kernels --quick               # 1M and 6.55M elements, 5 repetitions: under a minute
    scripts/bench kernels --json FILE           # everything: some minutes, 3 GB of memory
    scripts/bench kernels --device cuda         # those of the GPU

Every kernel's result is compared with its reference before it is timed. A kernel and its baselines run in
turn, and the medians of all turns are compared, so that a ratio belongs to one run on one machine in one
state.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from commhooks.native import abi

from . import low_bit, merge, selections, sparse
from .data import DATA, train
from .timing import Bench

_SIZES = (1_000_000, 6_550_000, 25_000_000, 100_000_000)
_DENSITIES = (0.001, 0.01)
_MERGED = (25_000, 250_000)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `scripts/bench kernels`."""
    add = parser.add_argument
    add("--json", type=Path, metavar="FILE", help="write the records there, one a line")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="whose kernels")
    add("--cub", type=Path, metavar="FILE", help="cuda: cub_rival.cu as a shared library")
    add("--quick", action="store_true", help="1M and 6.55M elements; on the CPU 5 repetitions")
    add("--sizes", type=int, nargs="+", help="elements")
    add("--repeats", type=int, default=20)
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    busy = (
        "one thread, and its CPU time instead of the wall clock: for a machine that is busy with other things"
    )
    add("--cpu-time", action="store_true", help=busy)
    add("--isa", help="instruction set of the library (scalar, avx2, avx512, neon); default: the best")


def run(options: argparse.Namespace) -> int:
    """Measures everything; returns the exit status."""
    if options.device == "cuda":
        from . import cuda  # noqa: PLC0415

        return cuda.run(options)
    threads = 1 if options.cpu_time else options.threads
    torch.set_num_threads(threads)
    if options.isa:
        abi.use_isa(options.isa)
    bench = Bench(5 if options.quick else options.repeats, threads, options.cpu_time, options.json)
    for name, text in abi.describe().items():
        print(f"# {name}: {text}")
    print(f"# load {os.getloadavg()[0]:.1f}, {bench.repeats} repetitions, medians; x = kernel over baseline")
    measure(bench, options)
    return 0


def measure(bench: Bench, options: argparse.Namespace) -> None:
    """All kernels at all sizes; the records are saved after each size."""
    runs = {density: train(density) for density in _DENSITIES}
    for density, trained in runs.items():
        labels = {"data": trained.name, "numel": trained.gradients[0].numel(), "density": density}
        hit_rate = {"kernel": "select_topk", **labels, "metric": "hit_rate", "unit": "1"}
        bench.add(hit_rate, trained.hits / trained.steps)
    for k in _MERGED:
        for density in _DENSITIES:
            merge.measure(bench, k, density)
    for numel, density in cases(options):
        for data in DATA:
            selections.measure(bench, data, numel, density, runs[density] if data == "real" else None)
        selections.measure_misses(bench, numel, density)
        for momentum in (0.0, 0.9):
            selections.measure_apart(bench, numel, density, momentum)
        sparse.measure(bench, numel, density)
        bench.save()
    for numel in sizes(options):
        low_bit.measure(bench, numel)
        bench.save()


def sizes(options: argparse.Namespace) -> Sequence[int]:
    """Numbers of elements."""
    return options.sizes or (_SIZES[:2] if options.quick else _SIZES)


def cases(options: argparse.Namespace) -> Iterator[tuple[int, float]]:
    """Sizes and densities."""
    for numel in sizes(options):
        for density in _DENSITIES:
            yield numel, density
