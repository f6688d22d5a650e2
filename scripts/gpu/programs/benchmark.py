"""The CUDA half of ``scripts/bench kernels`` in two parts: ``aims``, which the targets are about, and ``rest``."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from benchmarks.kernels import cuda as kernels_cuda
from benchmarks.kernels import cuda_tools as kernels_cuda_tools
from benchmarks.kernels.records import Records
from torch import Tensor

from gpu.programs import place

DRY_SIZES = [40_000]


def aims(bench: kernels_cuda.Bench, dry: bool) -> None:
    kernels_cuda.aims(bench, *([DRY_SIZES, [0.001]] if dry else [kernels_cuda.AIMED]))


def rest(bench: kernels_cuda.Bench, dry: bool) -> None:
    if not dry:
        kernels_cuda.aims(bench, [size for size in kernels_cuda.SIZES if size not in kernels_cuda.AIMED])
    kernels_cuda.rest(bench, *([DRY_SIZES, [0.001]] if dry else [kernels_cuda.SIZES]))


PARTS = {"aims": aims, "rest": rest}


class TorchAsCub:
    """In place of CUB in a dry run."""

    def run(self, gradient: Tensor, residual: Tensor, k: int) -> tuple[Tensor, Tensor]:
        indices = residual.add_(gradient).abs().topk(k).indices
        values = residual[indices]
        residual[indices] = 0.0
        return values, indices.int()


def wall_ms(call: kernels_cuda_tools.Turn, between: kernels_cuda_tools.Turn, repeats: int) -> float:
    """In place of the device's clock in a dry run: two calls."""
    begin = time.perf_counter()
    for turn in range(2):
        between(turn)
        call(turn)
    return 500.0 * (time.perf_counter() - begin)


def main() -> None:
    def add(parser: place.argparse.ArgumentParser) -> None:
        parser.add_argument("part", choices=list(PARTS))
        parser.add_argument("--cub", type=Path, help="cub_rival.cu as a shared library")

    here, options = place.begin(__doc__ or "", add)
    table = Records("cuda", 0, options.json)
    if here.dry:
        kernels_cuda_tools.ROTATE_BYTES, kernels_cuda.MERGED = 1, (250,)
        bench = kernels_cuda.Bench(table, cub=TorchAsCub(), timer=wall_ms, device="cpu", repeats=2)  # type: ignore[arg-type]
    else:
        print(f"{torch.cuda.get_device_name()}; medians; x = kernel over baseline")
        cub = None if options.cub is None else kernels_cuda_tools.Cub(options.cub)
        bench = kernels_cuda.Bench(table, cub=cub)
    PARTS[options.part](bench, here.dry)
    print(f"{len(table.records)} records")


if __name__ == "__main__":
    main()
