"""Many selections whose path varies while the outcome must not: what a fault of memory order would need luck to pass.

Inputs are fixed, the sample's seed changes from turn to turn, and so which candidates are listed. Matrix products on
another stream take multiprocessors away. All comparisons stay on the device and are read once, at the end.
"""

from __future__ import annotations

import torch

from commhooks.native import cuda
from commhooks.native.fused import Fused
from gpu.programs import place

SIZES = (6_553_600, 1_000_003, 90_001)
SECONDS = 8.0


def inputs(numel: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(numel)
    gradient = torch.randn(numel, device=device, generator=generator)
    return gradient, 0.5 * torch.randn(numel, device=device, generator=generator)


def main() -> None:
    here, _ = place.begin(__doc__ or "")
    sizes = here.pick(SIZES, (9_001, 503))
    cases, wanted = {}, {}
    for numel in sizes:
        place.step(f"what is wanted of {numel}")
        gradient, residual = cases[numel] = inputs(numel, here.device)
        left, k = residual.clone(), max(1, numel // 1000)
        corrected = (residual + gradient).abs()
        places = corrected.topk(k).indices.sort().values
        selected = cuda.select_topk(Fused(gradient, left), k)
        if not torch.equal(selected.indices.long(), places):
            raise SystemExit(f"select_topk of {numel} elements differs from torch.topk")
        wanted[numel] = (selected.values, selected.indices, left)
    bad = torch.zeros((), dtype=torch.int64, device=here.device)
    noise = None if here.dry else torch.cuda.Stream()
    square = torch.randn(here.pick(2048, 16), here.pick(2048, 16), device=here.device)
    place.step("turns")
    turns, total_ms = 0, 0.0
    while total_ms < here.pick(1e3 * SECONDS, 0.0) or turns == 0:
        begin = here.instant()
        for _ in range(here.pick(600, 4)):
            numel = sizes[turns % len(sizes)]
            gradient, residual = cases[numel]
            if turns % 4 == 0:
                with torch.cuda.stream(noise):
                    torch.mm(square, square)
            left = residual.clone()
            selected = cuda.select_topk(Fused(gradient, left), max(1, numel // 1000), seed=turns)
            for got, want in zip((selected.values, selected.indices, left), wanted[numel], strict=True):
                bad += (got != want).any()
            turns += 1
        end = here.instant()
        here.synchronize()
        total_ms += here.ms_between(begin, end)
    here.keep("turns", turns)
    here.keep("wrong", int(bad))
    if int(bad):
        raise SystemExit(
            f"{int(bad)} comparisons of {3 * turns} failed in {turns} selections of the same inputs"
        )
    print(f"{turns} selections beside matrix products: always the same bits")


if __name__ == "__main__":
    main()
