"""The checks of ``cuda_cases`` on sizes that a few seconds allow; also run by itself, under a sanitizer say.

python tests/native/cuda_runs.py small --device cuda
python tests/native/cuda_runs.py small --device cpu --library libcommhooks_cuda_emulated.so
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
from dataclasses import replace
from pathlib import Path

import cuda_cases as cases
import kernel_cases
import torch

from commhooks.native import abi, cuda
from commhooks.native.fused import PAD, Fused


def emulate(path: Path) -> None:
    """Lets ``commhooks.native.cuda`` call the emulated library, on tensors of the CPU. For the whole process."""
    loaded = abi.declare_cuda(ctypes.CDLL(str(path)))
    cuda._loaded = lambda: loaded
    cuda._guard = lambda device: contextlib.nullcontext()
    cuda._stream = lambda device: 0


def poison_scratch() -> None:
    """Fills all scratch memory with one bits: its contents must not matter. For the whole process."""
    scratch = cuda._scratch
    cuda._scratch = lambda *sizes: scratch(*sizes).fill_(255)


def ks(numel: int) -> list[int]:
    return sorted({0, min(1, numel), numel // 1000, numel // 37, numel // 3, numel})


def select_topk(device: str, sizes: tuple[int, ...], *, every: int = 1) -> int:
    """All data, dtypes and options in turn; returns the number of misses."""
    misses = turn = 0
    for numel in sizes:
        for kind in cases.DATA:
            for dtype in cases.DTYPES:
                for k in ks(numel):
                    turn += 1
                    if turn % every:
                        continue
                    options = turn * 7 % 64
                    fused = cases.make_fused(kind, numel, dtype, turn, options=options)
                    what = f"{kind} numel {numel} k {k} {dtype} options {options} turn {turn}"
                    unaligned = bool(options & 8)
                    misses += cases.check_select_topk(device, fused, k, what, unaligned=unaligned, seed=turn)
    return misses


def select_others(device: str, sizes: tuple[int, ...], *, every: int = 1) -> None:
    """``select_threshold`` and ``select_indices``."""
    turn = 0
    for numel in sizes:
        for kind in cases.DATA:
            for threshold in (0.0, 0.8, 2.5, float("inf")):
                for start in sorted({0, numel // 2, max(numel - 1, 0)}):
                    turn += 1
                    if turn % every:
                        continue
                    k = ks(numel)[turn % len(ks(numel))]
                    fused = cases.make_fused(kind, numel, cases.DTYPES[turn % 3], turn, options=turn * 7 % 64)
                    what = f"{kind} numel {numel} k {k} threshold {threshold} start {start} turn {turn}"
                    cases.check_select_threshold(device, fused, threshold, k, start, what)
                    used = torch.randperm(numel)[:k].sort().values.to(torch.int32)
                    padded = torch.cat((used, torch.full((turn % 3,), PAD, dtype=torch.int32)))
                    cases.check_select_indices(device, fused, padded, what)


def segments(device: str) -> None:
    """All segments active (then no element looks for its own), one of a single element inactive, all inactive."""
    offsets = torch.tensor([0, 0, 30_000, 30_001, 60_000, 90_001])
    for turn, dead in enumerate(((), (2,), range(5))):
        for dtype in cases.DTYPES[: 2 if turn == 0 else 1]:
            fused = cases.make_fused("gaussian", 90_001, dtype, turn, options=1)
            for number in dead:
                fused.grad[offsets[number] : offsets[number + 1]] = 0.0
            fused = replace(fused, segments=offsets)
            what = f"{dtype}, inactive segments {list(dead)}"
            cases.check_select_topk(device, fused, 900, what)
            cases.check_select_threshold(device, fused, 2.0, 500, 40_000, what)
            every = torch.arange(0, 90_001, 10_000, dtype=torch.int32)
            cases.check_select_indices(device, fused, every, what)


def random_and_merge(device: str, *, large: bool = False) -> None:
    for numel, k in ((1, 1), (2, 1), (2, 2), (5, 0), (1000, 1000), (70001, 700), (200_000, 3)):
        cases.check_random_indices(device, numel, k)
    merges = [
        (10, (0, 0), (0, 0), 3),
        (10, (0, 3), (2, 0), 5),
        (10, (10, 10), (0, 0), 4),
        (1000, (100, 50), (3, 0), 60),
        (1000, (100, 50), (3, 7), 0),
        (1000, (100, 50), (0, 0), 400),
        (30_000, (5000, 6000), (100, 0), 3000),
        (1_000_000, (2048, 2048), (0, 0), 2048),
    ]
    if large:
        merges += [
            (25_000_000, (250_000, 250_000), (0, 0), 250_000),
            (3_000_000, (1_500_000, 7), (1, 2), 10**6),
        ]
        cases.check_random_indices(device, 100_000_000, 100_000)
    for numel, sizes, pads, k in merges:
        for ties in (False, True):
            cases.check_merge_topk(device, numel, sizes, pads, k, ties)


def nan_memory(device: str, sizes: tuple[int, ...]) -> None:
    """NaN and infinities in residual, velocity and the values of a merge."""
    for turn, numel in enumerate(sizes):
        for kind in kernel_cases.POISONED:
            for k in ks(numel):
                velocity, segments = k % 2 == 1, 3 * (turn % 2)
                cases.check_select_with_nan(device, numel, k, kind, velocity=velocity, segments=segments)
            size = numel * 2 // 3
            for k in sorted({1, size // 100, size // 3, 2 * size + 5}):
                cases.check_merge_with_nan(device, numel, size, k, kind)


def write(device: str) -> None:
    for numel, k, pads in ((5, 0, 2), (5, 5, 0), (1000, 100, 7), (40_000, 5000, 0)):
        for scale in (1.0, -0.3):
            cases.check_scatter_add(device, numel, k, pads, scale)
    for dtype in cases.DTYPES:
        for numel, rows, k, pads in ((5, 1, 0, 2), (5, 1, 5, 0), (1003, 1, 100, 7), (1003, 4, 300, 7)):
            if rows == 1 or dtype == torch.float32:
                cases.check_write_back(device, dtype, numel, rows, k, pads, 0.25)


def messages(device: str) -> None:
    for numel, k, ranks in ((7, 0, 2), (1003, 33, 1), (1003, 33, 3), (40_001, 401, 40)):
        cases.check_messages(device, numel, k, ranks)


def low_bit(device: str, sizes: tuple[int, ...], few: bool = False) -> None:
    """Low-bit messages of all kinds of data, random bit patterns among them."""
    generator = torch.Generator().manual_seed(0)
    for numel in sizes:
        data = {
            kind: kernel_cases.values(kind, numel, generator)
            for kind in ("gaussian", "denormal", "bad", "zero")
        }
        data["huge"] = (torch.randn(numel, generator=generator) * 1e38).clamp(-3.4e38, 3.4e38)
        data["small"] = torch.randn(numel, generator=generator) * 2.0**-97
        data["halves"] = torch.randint(-14, 15, (numel,), generator=generator) * 0.5
        data["bits"] = (
            torch.randint(-(2**31), 2**31, (numel,), generator=generator).to(torch.int32).view(torch.float32)
        )
        if few:  # ThreadSanitizer takes minutes for all
            data = {kind: data[kind] for kind in ("gaussian", "bits")}
        for turn, (kind, x) in enumerate(data.items()):
            for bits in (1, 2, 4, 8):
                cases.check_low_bit(device, x, bits, 1 + turn % 3, f"{kind} numel {numel} bits {bits}")


def hostile_indices(device: str, turns: int) -> None:
    """Indices with any bits, as a peer may send them: nothing outside the buffers changes."""
    generator = torch.Generator().manual_seed(0)
    margin, numel, size = 64, 2000, 300
    room = torch.full((numel + 2 * margin,), 3.0, device=device)
    dense = room[margin:-margin]
    nasty = torch.tensor([-1, -(2**31), PAD, PAD - 1, numel, numel + 1, 0], dtype=torch.int32)
    for turn in range(turns):
        indices = torch.sort(torch.randperm(numel, generator=generator)[: 3 * size]).values.to(torch.int32)
        where = torch.randint(0, 3 * size, (1 + turn % 40,), generator=generator)
        indices[where] = nasty[torch.randint(0, nasty.numel(), where.shape, generator=generator)]
        if turn % 3 == 0:
            indices[where] = torch.randint(-(2**31), 2**31, where.shape, generator=generator).to(torch.int32)
        rows = indices.reshape(3, size).to(device)
        values = torch.randn(3, size, generator=generator).to(device)
        for count in (1, 3):
            cuda.scatter_add(dense, values[:count], rows[:count], 0.5)
            cuda.write_back(dense, values[:count], rows[:count], 0.5)
        cuda.write_back(dense.view(torch.float16), values[:1], rows[:1], 0.5)
        grad = torch.randn(numel, generator=generator).to(device)
        offsets = torch.tensor([0, 700, numel], device=device)
        cuda.select_indices(Fused(grad, dense, segments=offsets), rows[0])
        for k in (0, 10, 2 * size):
            merged = cuda.merge_topk(values[0], rows[0], values[1], rows[1], k)
            assert merged.survives_a.numel() == size
        edges = torch.cat((room[:margin], room[-margin:]))
        assert bool((edges == 3.0).all()), f"turn {turn}: an index wrote outside its buffer"


def small(device: str) -> int:
    """Every kernel once or a few times: what a slow tool can bear. Returns the number of misses."""
    misses = select_topk(device, (33, 5003, 90_001), every=17)
    select_others(device, (700, 40_001), every=19)
    cases.check_sample_threshold(device, 100_000, 1000)
    for numel, k in ((1000, 1000), (70_001, 700)):
        cases.check_random_indices(device, numel, k)
    cases.check_merge_topk(device, 30_000, (3000, 4000), (10, 0), 2000, True)
    write(device)
    messages(device)
    low_bit(device, (1, 5003))
    hostile_indices(device, 20)
    return misses


def few(device: str) -> int:
    """Every kernel and path, as little as that takes."""
    misses = 0
    for kind, options, k in (("gaussian", 3, 200), ("ties", 0, 5000), ("equal", 2, 70)):
        fused = cases.make_fused(kind, 20_011, torch.float32, 1, options=options)
        misses += cases.check_select_topk(device, fused, k, f"{kind} options {options} k {k}")
    fused = replace(fused, segments=torch.tensor([0, 9000, 9001, 20_011]))
    misses += cases.check_select_topk(device, fused, 70, "all segments active")
    cases.check_select_threshold(device, fused, 1.0, 1000, 11_000, "few")
    cases.check_select_indices(device, fused, torch.arange(0, 20_011, 7, dtype=torch.int32), "few")
    cases.check_random_indices(device, 70_001, 700)
    cases.check_merge_topk(device, 30_000, (3000, 4000), (10, 0), 2000, True)
    cases.check_messages(device, 1003, 33, 2)
    low_bit(device, (1027,), few=True)
    return misses


def everything(device: str) -> int:
    """What test_cuda.py compares first, for machines without pytest."""
    misses = select_topk(device, (0, 1, 2, 31, 517, 5003, 90_001), every=2)
    misses += select_topk(device, (1_000_003,), every=7)
    select_others(device, (0, 1, 700, 40_001, 300_007), every=3)
    segments(device)
    for numel, k in ((100, 10), (200_000, 2000), (3_000_000, 3000)):
        cases.check_sample_threshold(device, numel, k)
    random_and_merge(device, large=True)
    nan_memory(device, (1, 63, 1009, 20_011, 1_000_003))
    write(device)
    messages(device)
    low_bit(device, (0, 1, 255, 256, 257, 4097, 1_000_003))
    return misses


def fault(device: str) -> int:
    """Reads far behind the end of two arrays, on purpose: a sanitizer that does not say so sees nothing of ours."""
    room = torch.zeros(4, device=device)
    # Both arrays stay alive: what is to be seen is the read behind their end, not a use after they are freed.
    indices = torch.zeros(4, dtype=torch.int32, device=device)
    rows = abi.Rows(room.data_ptr(), indices.data_ptr(), 1, 50_000_000, 0, 0)
    cuda._call(room.device, "scatter_add", room.data_ptr(), 4, rows, 0.0)
    torch.cuda.synchronize()
    del room, indices
    return 0


RUNS = {"all": everything, "small": small, "few": few, "fault": fault}


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs the CUDA kernels against the reference.")
    parser.add_argument("what", choices=list(RUNS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--library", type=Path, help="an emulated library")
    parser.add_argument(
        "--raw-scratch", action="store_true", help="scratch as it is allocated: initcheck then sees it read"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.library is not None:
        emulate(options.library)
    if not options.raw_scratch:
        poison_scratch()
    print(f"{options.what}: as the reference says, {RUNS[options.what](options.device)} misses on the way")


if __name__ == "__main__":
    main()
