"""Measures what the cost model needs: the network between the ranks and the device's speed, in about a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from ..native import ops
from ..native.fused import Fused
from ..transports import Transport
from .cost_model import Costs, core_rounds

_TAG = 32000
_WHAT = "probing for the plan"
_LATENCY_BYTES = 64
_REPEATS = 5
_LARGEST_BYTES = 1 << 22
_LONG_S = 0.05  # a transfer this long tells the bandwidth
_NUMEL = 1 << 21
_DENSITY = 0.001


def probe(transport: Transport, numel: int = _NUMEL, device: torch.device | str = "cpu") -> Costs:
    """Costs of this job, the same on all ranks (each the slowest rank's). A collective call.

    All ranks measure at the same time, so cores and links that they share count as shared: use the result with
    ``crowding=1``.

    Args:
        transport: open, over the ranks in question.
        numel: elements of a typical bucket; the device is measured on at most 2**23.
        device: where gradients live.

    Raises:
        ValueError: ``numel`` is not positive.
        PeerTimeoutError, PeerLostError: a rank is missing.
    """
    if numel < 1:
        raise ValueError(f"numel must be positive, got {numel}")
    device = torch.device(device)
    elements = min(max(numel, 1 << 16), 1 << 23)
    select_s, gather_s, write_s, merge_s = _device_costs(transport, elements, device)
    message_s = byte_s = ring_step_s = reduce_s = 0.0
    if transport.world_size > 1:
        message_s, byte_s = _link(transport)
        ring_step_s, reduce_s = _all_reduce(transport, byte_s)
    mine = [message_s, byte_s, ring_step_s, reduce_s, merge_s, select_s, gather_s, write_s, _bucket_s()]
    return Costs(*slowest(transport, mine))


def slowest(transport: Transport, mine: list[float]) -> list[float]:
    """Number by number the largest over ranks: the same on all of them."""
    row = torch.tensor(mine, dtype=torch.float64).to(transport.device_type)
    rows = row.new_empty((transport.world_size, row.numel()))
    transport.all_gather(row, rows, tag=_TAG, what=_WHAT)
    return [float(x) for x in rows.max(0).values.cpu()]


def _link(transport: Transport) -> tuple[float, float]:
    """``(seconds per message, seconds per byte)``: every rank sends right and receives from the left at once."""
    message_s = slowest(transport, [_shift_s(transport, _LATENCY_BYTES, 4 * _REPEATS)])[0]
    size, last_size, last_s = 1 << 16, _LATENCY_BYTES, message_s
    while True:
        # The slowest rank's time decides, so that all ranks stop at the same size.
        seconds = slowest(transport, [_shift_s(transport, size, _REPEATS)])[0]
        if seconds > _LONG_S or size >= _LARGEST_BYTES:
            # The difference of two sizes: what a token bucket gives away at first is in both.
            return message_s, max(0.0, (seconds - last_s) / (size - last_size))
        size, last_size, last_s = 4 * size, size, seconds


def _shift_s(transport: Transport, size: int, repeats: int) -> float:
    right = (transport.rank + 1) % transport.world_size
    left = (transport.rank - 1) % transport.world_size
    send = torch.zeros(size, dtype=torch.uint8, device=transport.device_type)
    receive = torch.empty_like(send)

    def shift() -> None:
        transport.exchange([(right, send)], [(left, receive)], tag=_TAG, what=_WHAT)

    return _median_s(shift, repeats)


def _all_reduce(transport: Transport, byte_s: float) -> tuple[float, float]:
    """``(seconds per step of a collective, seconds per element added)``."""
    size = transport.world_size
    small = torch.zeros(1, device=transport.device_type)
    large = torch.zeros(1 << 18, device=transport.device_type)
    small_s = _median_s(lambda: transport.all_reduce(small, tag=_TAG, what=_WHAT), 2 * _REPEATS)
    small_s = slowest(transport, [small_s])[0]
    large_s = slowest(transport, [_median_s(lambda: transport.all_reduce(large, tag=_TAG, what=_WHAT), 3)])[0]
    share = (size - 1) / size * large.numel()
    return small_s / (2 * (size - 1)), max(0.0, (large_s - small_s - 2 * share * 4 * byte_s) / share)


def _device_costs(
    transport: Transport, numel: int, device: torch.device
) -> tuple[float, float, float, float]:
    """Seconds per element of top-k selection, random-k's update and write-back, and per pair of a merge."""
    k = max(64, int(_DENSITY * numel))
    generator = torch.Generator().manual_seed(transport.rank)
    grad = torch.randn(numel, generator=generator).to(device)
    fused = Fused(grad, torch.zeros(numel, device=device))
    pairs = ops.select_topk(fused, k)
    other = ops.random_indices(0, transport.rank, 0, numel, k, device)
    values = torch.randn(k, generator=generator).to(device)
    out = torch.empty_like(grad)
    select = _median_s(lambda: ops.select_topk(fused, k), _REPEATS, device)
    gather = _median_s(lambda: ops.select_indices(fused, other), _REPEATS, device)
    write = _median_s(lambda: ops.write_back(out, values, other), _REPEATS, device)
    merge = _median_s(lambda: _merge(pairs.values, pairs.indices, values, other, k), _REPEATS, device)
    return select / numel, gather / numel, write / numel, merge / (2 * k)


def _merge(values_a: Tensor, indices_a: Tensor, values_b: Tensor, indices_b: Tensor, k: int) -> None:
    merged = ops.merge_topk(values_a, indices_a, values_b, indices_b, k)
    ops.contains(indices_a, merged.indices)  # the bookkeeping of survivors


def _bucket_s() -> float:
    """A sparse bucket's constant part: about 25 small torch calls and two changes of thread."""
    tiny = torch.zeros(8)
    return 25 * _median_s(lambda: tiny.clone(), 20) + 1e-4


def _median_s(work: Callable[[], object], repeats: int, device: torch.device | None = None) -> float:
    times = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        work()
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begun)
    return median(times[1:])


def rounds_text(world_size: int) -> str:
    """How many rounds gTop-k takes, in words for a plan."""
    rounds, folds = core_rounds(world_size)
    return f"{rounds + 2 * folds} rounds"
