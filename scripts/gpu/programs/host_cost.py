"""What a call costs Python: microseconds until it returns, while the device works on."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from benchmarks.kernels.cuda_tools import segments_of

from commhooks.native import cuda, ops
from commhooks.native.fused import Fused
from gpu.programs import place

NUMEL, CALLS = 6_553_600, 60


def main() -> None:
    here, _ = place.begin(__doc__ or "")
    numel, calls = here.pick(NUMEL, 9_001), here.pick(CALLS, 2)
    kernels = (
        cuda if here.dry else ops
    )  # the dispatch of ops belongs to the cost; it would not choose the emulator
    k = numel // 1000
    gradient, residual = torch.randn(numel, device=here.device), torch.zeros(numel, device=here.device)
    fused = Fused(gradient, residual, segments=segments_of(numel, here.device))
    out = kernels.select_topk(fused, k)
    rows = (out.values[None].contiguous(), out.indices[None].contiguous())
    functions: dict[str, Callable[[], object]] = {
        "select_topk": lambda: kernels.select_topk(fused, k),
        "merge_topk": lambda: kernels.merge_topk(out.values, out.indices, out.values, out.indices, k),
        "write_back": lambda: kernels.write_back(gradient, *rows),
        "scatter_add": lambda: kernels.scatter_add(residual, *rows),
        "torch.add, for scale": lambda: residual.add_(gradient),
    }
    for name, call in functions.items():
        place.step(name)
        for _ in range(here.pick(10, 1)):
            call()
        here.synchronize()
        times = []
        for _ in range(calls):
            begin = time.perf_counter()
            call()
            times.append(1e6 * (time.perf_counter() - begin))
        here.synchronize()
        here.keep(name, place.median(times))
        print(f"{name}: {place.median(times):.1f} us")
    print(f"host cost of {', '.join(functions)}")


if __name__ == "__main__":
    main()
