"""`scripts/bench kernels --device cuda`: milliseconds on the device against copies, `r += g`, torch and CUB.

Medians of 20 by CUDA events, behind a kernel that keeps the device busy while Python enqueues, so that only
work of the device counts. Operands rotate, so that a bucket is not found in the device's cache. Every kernel,
and CUB, is checked before it is timed. What the project's aims ask for comes first, and records are saved
after each case, so that a run that is cut short has it.

Metrics: `time`, `misses` (calls whose guess failed, the untimed ones included) and `hit_rate`. Baselines of a
time: `memcpy` (a copy of n floats), `r+=g`, `torch` (the operators that the kernel replaces), `torch.topk`
(of the corrected gradient alone) and `cub`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from commhooks.native import abi, cuda, ops, reference
from commhooks.native.fused import Fused

from . import cuda_checks as check
from .cuda_tools import (
    MOMENTUM,
    Cub,
    Operands,
    Timer,
    device_ms,
    nothing,
    segments_of,
)
from .data import RealRun, train
from .records import BY_BITMAP, HALF_GRADIENT, WITH_VELOCITY, Model, Record, Records

#: In this order: the bucket of 25 MB and the largest size are what the aims are about.
AIMED = (6_553_600, 100_000_000, 25_000_000)
SIZES = (*AIMED, 1_000_000)
DENSITIES = (0.001, 0.01)
MERGED = (25_000, 250_000)
_FEW = 5  # repetitions of what is slow and only a rival


LOW_BITS = (1, 2, 4, 8)


class Bench:
    """Times cases into a table. ``timer`` and ``device`` are others where there is no GPU, in tests."""

    def __init__(
        self,
        table: Records,
        *,
        cub: Cub | None = None,
        repeats: int = 20,
        timer: Timer = device_ms,
        device: str = "cuda",
    ) -> None:
        self.table, self.cub, self.repeats, self.device = table, cub, repeats, device
        self.timer = timer

    def dense(self, operands: Operands) -> dict[str, float]:
        """Milliseconds of a copy of a residual (8 n bytes) and of ``r += g``."""
        grads, residuals, count = operands.gradients, operands.residuals, operands.count
        return {
            "memcpy": self.timer(
                lambda turn: residuals[turn % count].copy_(residuals[(turn + 1) % count]),
                nothing,
                self.repeats,
            ),
            "r+=g": self.timer(
                lambda turn: residuals[turn % count].add_(grads[turn % count]), nothing, self.repeats
            ),
        }

    def topk(
        self, labels: Record, operands: Operands, k: int, model: Model | None = None
    ) -> dict[str, float]:
        """select_topk in the steady state of error feedback; returns its dense baselines' milliseconds."""
        labels = {"kernel": "select_topk", **labels}
        first = operands.fused(0)
        few = check.small(k, first)
        check.selection(
            lambda f: cuda.select_topk(f, few), lambda f: reference.select_topk(f, few), first, "select_topk"
        )
        dense = self.dense(operands)
        operands.clear()
        reports: list[Tensor] = []

        def step(turn: int) -> None:
            reports.append(cuda.select_topk(operands.fused(turn), k, seed=len(reports)).report)

        for turn in range(4 * operands.count):
            step(turn)
        ms = self.timer(step, nothing, self.repeats)
        misses = sum(int(report[2]) > 0 for report in reports)
        rivals = self.rivals(operands, k) if labels["data"] == "gaussian" else {}
        self.table.time(labels, ms, dense | rivals, model=model)
        self.table.add({**labels, "metric": "misses", "unit": "1"}, misses)
        self.table.add({**labels, "metric": "hit_rate", "unit": "1"}, 1 - misses / len(reports))
        return dense

    def rivals(self, operands: Operands, k: int) -> dict[str, float]:
        """Milliseconds of torch.topk alone, torch's pipeline, and CUB with its passes."""
        grads, residuals, count = operands.gradients, operands.residuals, operands.count
        alone = [residual.abs() for residual in residuals[:2]]
        found = {
            "torch.topk": self.timer(
                lambda turn: torch.topk(alone[turn % 2], k, sorted=False), nothing, _FEW
            ),
            "torch": self.timer(
                lambda turn: torch_pipeline(residuals[turn % count], grads[turn % count], k), nothing, _FEW
            ),
        }
        if self.cub is None or grads[0].numel() % 4:  # the rival adds four at a time
            return found
        rival = self.cub
        check.cub(rival, grads[0], k)
        cub = self.timer(
            lambda turn: rival.run(grads[turn % count], residuals[turn % count], k), nothing, self.repeats
        )
        return found | {"cub": cub}

    def with_segments(self, numel: int, density: float) -> None:
        """select_topk as the hooks call it: they always pass segments."""
        operands = replace(
            Operands.make("gaussian", numel, self.device), segments=segments_of(numel, self.device)
        )
        labels = {"data": "gaussian, segments", "numel": numel, "density": density}
        self.topk(labels, operands, max(1, round(density * numel)))

    def variants(self, numel: int, density: float) -> None:
        """Segments with velocity, with bfloat16 gradients, and with a segment inactive."""
        k = max(1, round(density * numel))
        plain = replace(
            Operands.make("gaussian", numel, self.device), segments=segments_of(numel, self.device)
        )
        halves = replace(plain, gradients=[gradient.bfloat16() for gradient in plain.gradients])
        velocities = [torch.zeros(numel, device=self.device) for _ in plain.gradients]
        cases: Iterable[tuple[str, Operands, Model | None]] = (
            ("gaussian, segments, velocity", replace(plain, velocities=velocities), WITH_VELOCITY),
            ("gaussian, segments, bfloat16", halves, HALF_GRADIENT),
            ("gaussian, segment inactive", plain, None),
        )
        for data, operands, model in cases:
            if data.endswith("inactive") and operands.segments is not None:
                for gradient in operands.gradients:
                    gradient[int(operands.segments[-2]) :] = 0.0
            self.topk({"data": data, "numel": numel, "density": density}, operands, k, model)

    def misses(self, numel: int, density: float) -> None:
        """No guess holds: all magnitudes but k / 2 are equal. The residual is zeroed untimed."""
        k = max(1, round(density * numel))
        dense = self.dense(Operands.make("gaussian", numel, self.device))
        gradient = torch.full((numel,), 1e-3, device=self.device)
        gradient[:: max(1, 2 * numel // k)] = 1.0
        residual = torch.zeros(numel, device=self.device)
        labels = {"kernel": "select_topk", "data": "missed", "numel": numel, "density": density}
        reports: list[Tensor] = []

        def step(turn: int) -> None:
            reports.append(cuda.select_topk(Fused(gradient, residual), k, seed=turn).report)

        ms = self.timer(step, lambda turn: residual.zero_(), self.repeats)
        check.require(
            all(int(report[2]) > 0 for report in reports), "a guess held where it was meant to fail"
        )
        self.table.time(labels, ms, dense)
        self.table.add({**labels, "metric": "misses", "unit": "1"}, len(reports))

    def others(self, labels: Record, operands: Operands, k: int, dense: dict[str, float]) -> None:
        """select_threshold and select_indices."""
        numel, count = labels["numel"], operands.count
        operands.clear()
        threshold = cuda.sample_threshold(operands.fused(0), k)
        few = check.small(k, operands.fused(0))
        check.selection(
            lambda f: cuda.select_threshold(f, threshold, few),
            lambda f: reference.select_threshold(f, threshold, few),
            operands.fused(0),
            "select_threshold",
        )
        # The sign changes from round to round: residuals that grew would bring more above the threshold.
        opposite = [-gradient for gradient in operands.gradients]

        def by_threshold(turn: int) -> None:
            fused = operands.fused(turn)
            if turn // count % 2:
                fused = replace(fused, grad=opposite[turn % count])
            cuda.select_threshold(fused, threshold, k)

        self.pass_time("select_threshold", labels, self.timer(by_threshold, nothing, self.repeats), dense)
        indices = cuda.random_indices(0, 0, 0, numel, k, torch.device(self.device))
        low = indices[indices < min(numel, 1_000_000)]
        check.selection(
            lambda f: cuda.select_indices(f, low),
            lambda f: reference.select_indices(f, low.cpu()),
            operands.fused(0),
            "select_indices",
        )
        ms = self.timer(
            lambda turn: cuda.select_indices(operands.fused(turn), indices), nothing, self.repeats
        )
        self.pass_time("select_indices", labels, ms, dense)

    def pass_time(self, kernel: str, labels: Record, ms: float, dense: dict[str, float]) -> None:
        self.table.time({"kernel": kernel, **labels}, ms, dense)

    def sparse(self, labels: Record, operands: Operands, k: int, dense: dict[str, float]) -> None:
        """write_back (a line of its own), scatter_add and random_indices; the residuals serve as room."""
        numel, room, count, device = (
            labels["numel"],
            operands.residuals,
            operands.count,
            torch.device(self.device),
        )
        check.random_indices(numel, k, self.device)
        indices = cuda.random_indices(1, 2, 3, numel, k, device)
        values, long = torch.randn(k, device=device), indices.long()
        check.writes(room[0], values, indices)
        ms = self.timer(
            lambda turn: cuda.write_back(room[turn % count], values[None], indices[None], 0.25),
            nothing,
            self.repeats,
        )
        torch_ms = self.timer(
            lambda turn: room[turn % count].zero_().index_add_(0, long, values, alpha=0.25),
            nothing,
            self.repeats,
        )
        self.pass_time("write_back", labels, ms, {**dense, "torch": torch_ms})
        ms = self.timer(
            lambda turn: cuda.scatter_add(room[turn % count], values[None], indices[None]),
            nothing,
            self.repeats,
        )
        torch_ms = self.timer(
            lambda turn: room[turn % count].index_add_(0, long, values), nothing, self.repeats
        )
        self.table.time({"kernel": "scatter_add", **labels}, ms, {"torch": torch_ms})
        ms = self.timer(lambda turn: cuda.random_indices(0, turn, 0, numel, k, device), nothing, self.repeats)
        torch_ms = self.timer(
            lambda turn: torch.randperm(numel, device=device, dtype=torch.int32)[:k].sort(), nothing, _FEW
        )
        self.table.time({"kernel": "random_indices", **labels}, ms, {"torch": torch_ms}, model=BY_BITMAP)

    def merge(self, k: int, density: float) -> None:
        """gTop-k's inner step on two selections of k pairs."""
        numel, device = int(k / density), torch.device(self.device)
        parts = [
            (torch.randn(k, device=device), cuda.random_indices(7, s, 0, numel, k, device)) for s in range(2)
        ]
        lists = (*parts[0], *parts[1])
        check.merge(lists, k)
        room = [torch.empty_like(part) for part in lists]

        def memcpy(turn: int) -> None:
            for to, part in zip(room, lists, strict=True):
                to.copy_(part)

        baselines = {
            "memcpy": self.timer(memcpy, nothing, self.repeats),
            "torch": self.timer(lambda turn: torch_merge(*lists, k), nothing, _FEW),
        }
        ms = self.timer(lambda turn: cuda.merge_topk(*lists, k), nothing, self.repeats)
        labels = {"kernel": "merge_topk", "data": "gaussian", "numel": numel, "density": density}
        self.table.time(labels, ms, baselines)

    def low_bit(self, numel: int) -> None:
        """Messages in 1, 2, 4 and 8 bits beside one pass that reads and writes a vector."""
        x = torch.randn(numel, device=self.device)
        rest, total, other = torch.empty_like(x), torch.zeros_like(x), torch.ones_like(x)
        baselines = {"r*=a": self.timer(lambda turn: other.mul_(1.0), nothing, self.repeats)}
        for bits in LOW_BITS:
            check.low_bit(x, bits)
            message = x.new_empty(ops.low_bit_size(numel, bits), dtype=torch.uint8)
            cuda.low_bit_encode(x, bits, message)
            labels = {"data": f"gaussian, {bits} bits", "numel": numel, "density": 1.0}
            ms = self.timer(
                lambda turn, b=bits, m=message: cuda.low_bit_decode_add(m[None], b, total),
                nothing,
                self.repeats,
            )
            self.table.time({"kernel": "low_bit_decode_add", **labels}, ms, baselines)
            ms = self.timer(
                lambda turn, b=bits, m=message: cuda.low_bit_encode(rest, b, m, rest),
                lambda turn: rest.copy_(x),  # a remainder is no gaussian: each turn begins with x again
                self.repeats,
            )
            self.table.time({"kernel": "low_bit_encode", **labels}, ms, baselines)

    def aimed_at(self, numel: int, density: float) -> None:
        """What the project's aims are about: select_topk on gaussian gradients, plain and with segments."""
        operands = Operands.make("gaussian", numel, self.device)
        k = max(1, round(density * numel))
        check.topk_at_full_size(operands.gradients[0], k)
        self.topk({"data": "gaussian", "numel": numel, "density": density}, operands, k)
        del operands
        self.with_segments(numel, density)
        self.table.save()

    def beside(self, numel: int, density: float) -> None:
        """The other kernels; select_topk where its guess fails, with options, and on clustered gradients."""
        operands = Operands.make("gaussian", numel, self.device)
        k = max(1, round(density * numel))
        labels, dense = {"data": "gaussian", "numel": numel, "density": density}, self.dense(operands)
        self.others(labels, operands, k, dense)
        self.sparse(labels, operands, k, dense)
        del operands
        self.misses(numel, density)
        self.variants(numel, density)
        self.selections("clustered", numel, density)

    def selections(self, kind: str, numel: int, density: float, run: RealRun | None = None) -> None:
        """select_topk on clustered, heavy-tailed or real gradients."""
        k = max(1, round(density * numel))
        operands = Operands.make(kind, numel, self.device, run)
        labels = {"data": kind if run is None else run.name, "numel": numel, "density": density}
        check.topk_at_full_size(operands.gradients[0], k)
        self.topk(labels, operands, k)
        self.table.save()


def torch_pipeline(residual: Tensor, gradient: Tensor, k: int) -> None:
    """What select_topk replaces."""
    corrected = residual.add_(gradient)
    indices = torch.topk(corrected.abs(), k, sorted=False).indices
    corrected.gather(0, indices)
    corrected.scatter_(0, indices, 0.0)


def torch_merge(values_a: Tensor, indices_a: Tensor, values_b: Tensor, indices_b: Tensor, k: int) -> Tensor:
    """What merge_topk replaces, without the survivors; it waits for the device."""
    union, places = torch.cat((indices_a, indices_b)).unique(return_inverse=True)
    total = torch.zeros(union.numel(), device=values_a.device)
    total.index_add_(0, places, torch.cat((values_a, values_b)))
    return union[torch.topk(total.abs(), k, sorted=False).indices.sort().values]


def aims(bench: Bench, sizes: Iterable[int], densities: Iterable[float] = DENSITIES) -> None:
    """The cases that the project's aims are about."""
    for numel in sizes:
        for density in densities:
            bench.aimed_at(numel, density)


def rest(bench: Bench, sizes: Iterable[int], densities: Iterable[float] = DENSITIES) -> None:
    """All other cases: real gradients first, then the other kernels, merges, and heavy-tailed gradients."""
    sizes, densities = list(sizes), list(densities)
    for density in densities:
        trained = train(density, bench.device)
        labels = {"kernel": "select_topk", "data": trained.name, "numel": trained.gradients[0].numel()}
        hits = {**labels, "density": density, "metric": "hit_rate", "unit": "1"}
        bench.table.add(hits, trained.hits / trained.steps)
        for numel in sizes:
            bench.selections("real", numel, density, trained)
    for numel in sizes:
        for density in densities:
            bench.beside(numel, density)
    for k in MERGED:
        for density in densities:
            bench.merge(k, density)
    for numel in sizes:
        bench.low_bit(numel)
    for numel in sizes:
        for density in densities:
            bench.selections("heavy", numel, density)
    bench.table.save()


def run(options: argparse.Namespace) -> int:
    """Measures everything; exit status 3 where there is no GPU or no library for it."""
    if not torch.cuda.is_available() or abi.cuda() is None:
        print("no CUDA device here, or no CUDA library: nothing was measured", file=sys.stderr)
        return 3
    for name, text in abi.describe().items():
        print(f"# {name}: {text}")
    print(
        f"# {torch.cuda.get_device_name()}; medians; x = kernel / baseline; momentum {MOMENTUM} with velocity"
    )
    bench = Bench(
        Records("cuda", 0, options.json),
        cub=Cub(options.cub) if options.cub is not None else None,
        repeats=options.repeats,
    )
    sizes = options.sizes or ((SIZES[0], SIZES[3]) if options.quick else SIZES)
    aims(bench, sizes)
    rest(bench, sizes)
    return 0
