"""P ranks as threads that share one GPU, and the same on the CPU: all schemes, bit for bit.

The transport moves tensors on the device, as NCCL would, so packing, masks, merges and sums run there: what no test at
world size 1 and none on the CPU reaches. All threads queue on the default stream, which keeps them in order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from commhooks import (
    AllGather,
    Bucket,
    Dense,
    ErrorFeedback,
    GTopK,
    LowBit,
    RandomK,
    Reducer,
    SharedIndices,
    TopK,
)
from commhooks.transports import Transport, in_process
from gpu.programs import place

WORLDS = (2, 4, 5)
STEPS = 3
SEGMENTS = (60_000, 1, 4_999, 35_000)
Scheme = Callable[[Transport], Reducer]
SCHEMES: dict[str, Scheme] = {
    "topk": lambda t: Reducer(TopK(0.01), AllGather(t), ErrorFeedback(momentum=0.9, factor_masking=True)),
    "gtopk": lambda t: Reducer(TopK(0.01), GTopK(t), ErrorFeedback(momentum=0.9)),
    "gtopk, tree": lambda t: Reducer(TopK(0.01), GTopK(t, algorithm="tree"), ErrorFeedback()),
    "randomk": lambda t: Reducer(RandomK(0.01, seed=7), SharedIndices(t), ErrorFeedback()),
    "dense": lambda t: Reducer(None, Dense(t), ErrorFeedback(momentum=0.9)),
    "4 bits": lambda t: Reducer(None, LowBit(4, t), ErrorFeedback(momentum=0.9)),
    "bfloat16": lambda t: Reducer(None, LowBit(16, t), ErrorFeedback()),
    "topk, no memory": lambda t: Reducer(TopK(0.01), AllGather(t)),
}


def gradient(rank: int, step: int, dtype: torch.dtype, numel: int) -> Tensor:
    """On the CPU; the third parameter has none in odd steps."""
    result = torch.randn(numel, generator=torch.Generator().manual_seed(100 * rank + step)).to(dtype)
    if step % 2:
        begin = sum(SEGMENTS[:2])
        result[begin : begin + SEGMENTS[2]] = 0.0
    return result


def train(make: Scheme, world_size: int, device: str, dtype: torch.dtype) -> list[list[Tensor]]:
    """Every rank's averaged gradient after each step, on the CPU."""
    numel, names = sum(SEGMENTS), tuple(f"p{i}" for i in range(len(SEGMENTS)))

    def work(transport: in_process.InProcessTransport) -> list[Tensor]:
        transport.device_type = device
        reducer, seen = make(transport), []
        for step in range(STEPS):
            buffer = gradient(transport.rank, step, dtype, numel).to(device)
            reducer.reduce(Bucket(0, buffer, names, SEGMENTS))
            seen.append(buffer.cpu())
        return seen

    return in_process.run(world_size, work, timeout_s=20)


def main() -> None:
    here, _ = place.begin(__doc__ or "")
    cases = 0
    for world_size in here.pick(WORLDS, (2, 5)):
        for name, make in SCHEMES.items():
            for dtype in (torch.float32, torch.bfloat16):
                place.step(f"{name}, P = {world_size}, {dtype}")
                got, want = (train(make, world_size, device, dtype) for device in (here.device, "cpu"))
                for rank, (ours, theirs) in enumerate(zip(got, want, strict=True)):
                    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
                        if not torch.equal(a, b):
                            where = int((a != b).nonzero()[0])
                            raise SystemExit(
                                f"{name}, P = {world_size}, {dtype}: rank {rank}, step {step}: {int((a != b).sum())} "
                                f"elements differ, first {where}: {a[where]} on {here.device}, {b[where]} on the CPU"
                            )
                cases += 1
    print(f"{cases} cases of P ranks on one device: the bits of the CPU")


if __name__ == "__main__":
    main()
