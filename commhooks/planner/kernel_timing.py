"""Measures this rank's speed: kernels on more memory than caches hold, and one small bucket end to end."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ..exchange import AllGather
from ..gradient.bucket import Bucket
from ..gradient.side_stream import ready_event, stream_after
from ..memory import ErrorFeedback
from ..native import ops
from ..native.fused import Fused
from ..reduction.reducer import Reducer
from ..selection.selectors import TopK
from ..transports import Transport

SMALL_NUMEL = 4096
SMALL_K = 64
_BUCKET_NUMEL = 6_553_600  # 25 MB, DDP's default
_LEAST_NUMEL = 1 << 16
_BUCKETS = 3  # their gradients and residuals are more than caches hold, as in a step
_REPEATS = 5
_SMALL_REPEATS = 10
_DENSITY = 0.001
_BITS = 4


def kernel_costs(numel: int, device: torch.device, seed: int) -> tuple[float, ...]:
    """Measures select_s, gather_s, write_s, merge_s, encode_s and decode_s of :class:`.Costs`, in this order.

    ``merge_s`` is seconds per pair of a merge. The others are seconds per element: of top-k selection,
    random-k's update and write-back, and of writing and adding codes of 4 bits.

    Args:
        numel: parameters of the model. At most three buckets of 25 MB are worked on, in turns, as in a step.
        device: where gradients live.
        seed: of the gradients. Give every rank another one.
    """
    size = min(max(numel, _LEAST_NUMEL), _BUCKET_NUMEL)
    count = min(_BUCKETS, -(-max(numel, size) // size))
    k = max(64, int(_DENSITY * size))
    generator = torch.Generator("cpu").manual_seed(seed)
    gradient = torch.randn(size, generator=generator, dtype=torch.float32, device="cpu").to(device)
    values = torch.randn(k, generator=generator, dtype=torch.float32, device="cpu").to(device)
    indices = ops.random_indices(0, seed, 0, size, k, device)
    buckets = [Fused(gradient.clone(), torch.zeros_like(gradient)) for _ in range(count)]

    def turns(work: Callable[[Fused], object]) -> float:
        """Returns the median seconds of ``work`` per element.

        It is not the least, because other programs delay a real step too.
        """
        times = []
        for _ in range(_REPEATS):
            for bucket in buckets:
                bucket.grad.copy_(gradient)  # as backward does, which also displaces what caches hold
            times.append(least_s(lambda: [work(b) for b in buckets], 1, device))
        return sorted(times)[len(times) // 2] / (count * size)

    select = turns(lambda b: ops.select_topk(b, k))
    gather = turns(lambda b: ops.select_indices(b, indices))
    write = turns(lambda b: ops.write_back(b.grad, values, indices))
    codes = torch.empty(ops.low_bit_size(size, _BITS), dtype=torch.uint8, device=device)
    encode = turns(lambda b: ops.low_bit_encode(b.grad, _BITS, codes, b.grad))
    decode = turns(lambda b: ops.low_bit_decode_add(codes, _BITS, b.grad))
    pairs = ops.select_topk(buckets[0], k)
    merge = least_s(lambda: _merge(pairs.values, pairs.indices, values, indices, k), _REPEATS + 1, device)
    return select, gather, write, merge / (2 * k), encode, decode


def small_bucket_s(transport: Transport, device: torch.device, dense: bool) -> float:
    """Measures the least seconds in which a Reducer handles a small bucket. A collective call.

    Of ``SMALL_NUMEL`` elements this is mostly the constant cost of a bucket. The Reducer runs in a thread of
    its own, as in a ``SparseState``, so that handing over and waking count.

    Args:
        transport: an open transport. ``SMALL_K`` pairs are all-gathered, or the bucket is all-reduced.
        device: where gradients live.
        dense: send the bucket and its residual densely, as a ``dense_crossover`` does.
    """
    rule = _dense if dense else _sparse
    reducer = Reducer(
        TopK(SMALL_K / SMALL_NUMEL), AllGather(transport), ErrorFeedback(), dense_crossover=rule
    )
    generator = torch.Generator("cpu").manual_seed(transport.rank)
    gradient = torch.randn(SMALL_NUMEL, generator=generator, dtype=torch.float32, device="cpu").to(device)
    bucket = Bucket(0, gradient.clone(), ("probe",), (SMALL_NUMEL,))

    def reduce(ready: Any) -> None:
        with stream_after(ready, bucket.buffer):
            reducer.reduce(bucket)

    with ThreadPoolExecutor(1, "commhooks-probe") as worker:

        def through() -> None:
            bucket.buffer.copy_(gradient)
            worker.submit(reduce, ready_event(bucket.buffer)).result()

        return least_s(through, _SMALL_REPEATS + 1, device)


def least_s(work: Callable[[], object], repeats: int, device: torch.device | None = None) -> float:
    """Returns the least seconds of ``repeats`` calls. For work so short that one delay would exceed it."""
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begun)
    return min(times)


def _merge(values_a: Tensor, indices_a: Tensor, values_b: Tensor, indices_b: Tensor, k: int) -> None:
    merged = ops.merge_topk(values_a, indices_a, values_b, indices_b, k)
    ops.contains(indices_a, merged.indices)  # finds the pairs that survived, as an exchange does


def _dense(numel: int, k: int, world_size: int) -> bool:
    return True


def _sparse(numel: int, k: int, world_size: int) -> bool:
    return False
