"""Measures what the cost model needs: the network between the ranks and the device's speed, in about a
second.

All ranks take part in the same collectives: what decides on one more is the slowest rank's time, the same on
all.
"""

from __future__ import annotations

import torch

from ..transports import Transport
from ..transports.recursive_doubling import DOUBLING_BYTES
from ..wire.message import HEADER_WORDS
from .cost_model import Costs
from .kernel_timing import SMALL_K, SMALL_NUMEL, kernel_costs, least_s, small_bucket_s

_TAG = 32000
_WHAT = "probing for the plan"
_LATENCY_BYTES = 64
_RING_NUMEL = DOUBLING_BYTES // 4 + 1  # the smallest all-reduce that is a ring everywhere
_REPEATS = 6  # the first one opens connections and touches memory
_FEW = 3  # where one takes long
_LARGEST_BYTES = 25 << 20  # DDP's bucket
_LONG_S = 0.05  # a transfer this long tells the bandwidth
_GROWTH = 4


def probe(transport: Transport, numel: int = 1 << 21, device: torch.device | str = "cpu") -> Costs:
    """Costs of this job, the same on all ranks (each the slowest rank's). A collective call.

    All ranks measure at the same time, so cores and links that they share count as shared: use the result
    with ``crowding=1``. Of the network's measurements the least counts, of the passes over memory the median:
    on a busy machine compression is rather promised too little than too much.

    Args:
        transport: open, over the ranks in question.
        numel: parameters of the model; the device is measured on at most 75 MB of them.
        device: where gradients live.

    Raises:
        ValueError: ``numel`` is not positive.
        PeerTimeoutError, PeerLostError: a rank is missing.
    """
    if numel < 1:
        raise ValueError(f"numel must be positive, got {numel}")
    device = torch.device(device)
    message_s = byte_s = ring_step_s = reduce_s = 0.0
    if transport.world_size > 1:
        message_s, byte_s = _link(transport)
        # The largest model's size: all ranks must do the same number of all-reduces.
        largest_bytes = min(_LARGEST_BYTES, 4 * int(slowest(transport, [float(numel)])[0]))
        ring_step_s, reduce_s, byte_s = _all_reduce(transport, byte_s, largest_bytes)
    select_s, gather_s, write_s, merge_s = kernel_costs(numel, device, transport.rank)
    bucket_s, dense_bucket_s = _constants(transport, device)
    mine = [message_s, byte_s, ring_step_s, reduce_s, merge_s, select_s, gather_s, write_s]
    return Costs(*slowest(transport, [*mine, bucket_s, dense_bucket_s]))


def slowest(transport: Transport, mine: list[float]) -> list[float]:
    """Number by number the largest over ranks: the same on all of them."""
    row = torch.tensor(mine, dtype=torch.float64)
    rows = row.new_empty((transport.world_size, row.numel()))
    transport.all_gather(row, rows, tag=_TAG, what=_WHAT)
    return [float(x) for x in rows.max(0).values]


def _constants(transport: Transport, device: torch.device) -> tuple[float, float]:
    """Seconds of a sparse and of a dense bucket beyond passes and exchange, from small ones."""
    pairs = torch.zeros(HEADER_WORDS + 2 * SMALL_K, dtype=torch.int32, device=transport.device_type)
    rows = pairs.new_empty((transport.world_size, pairs.numel()))
    gather_s = least_s(lambda: transport.all_gather(pairs, rows, tag=_TAG, what=_WHAT), 2 * _REPEATS)
    reduce_s = _all_reduce_s(transport, SMALL_NUMEL + 1, 2 * _REPEATS)
    through = [small_bucket_s(transport, device, dense) for dense in (False, True)]
    sparse_s, dense_s, gather_s, reduce_s = slowest(transport, [*through, gather_s, reduce_s])
    return max(0.0, sparse_s - gather_s), max(0.0, dense_s - reduce_s)


def _link(transport: Transport) -> tuple[float, float]:
    """``(seconds per message, seconds per byte)``: every rank sends right and receives from the left."""
    empty_s = slowest(transport, [_shift_s(transport, _LATENCY_BYTES, 4 * _REPEATS)])[0]
    size, last_size, last_s = 1 << 16, _LATENCY_BYTES, empty_s
    while True:
        seconds = slowest(transport, [_shift_s(transport, size, _repeats(last_s))])[0]
        if seconds > _LONG_S or _GROWTH * size > _LARGEST_BYTES:
            break
        size, last_size, last_s = _GROWTH * size, size, seconds
    # The difference of two sizes: what a token bucket gives away at first is in both.
    byte_s = max(0.0, (seconds - last_s) / (size - last_size))
    return max(0.0, empty_s - _LATENCY_BYTES * byte_s), byte_s


def _shift_s(transport: Transport, size: int, repeats: int) -> float:
    right = (transport.rank + 1) % transport.world_size
    left = (transport.rank - 1) % transport.world_size
    send = torch.zeros(size, dtype=torch.uint8, device=transport.device_type)
    receive = torch.empty_like(send)

    def shift() -> None:
        transport.exchange([(right, send)], [(left, receive)], tag=_TAG, what=_WHAT)

    return least_s(shift, repeats)


def _all_reduce(transport: Transport, byte_s: float, largest_bytes: int) -> tuple[float, float, float]:
    """``(seconds per step of a collective, seconds per element added, seconds per byte)``.

    A small model's all-reduce is not grown further: what fits into caches is faster, byte by byte.

    The last is ``byte_s``, or less where the all-reduce itself was faster than that: then the link is.
    """
    world_size = transport.world_size
    share = (world_size - 1) / world_size
    small_s = slowest(transport, [_all_reduce_s(transport, _RING_NUMEL, _REPEATS)])[0]
    numel, seconds = _LARGEST_BYTES // 4 // _GROWTH**4, small_s
    while True:
        seconds = slowest(transport, [_all_reduce_s(transport, numel, _repeats(seconds))])[0]
        if seconds > _LONG_S or _GROWTH * 4 * numel > largest_bytes:
            break
        numel *= _GROWTH
    element_s = max(0.0, (seconds - small_s) / (numel - _RING_NUMEL)) / share  # both ways, and the addition
    byte_s = min(byte_s, element_s / 8)
    alone_s = max(0.0, small_s - share * _RING_NUMEL * element_s)  # of 2 (P - 1) steps
    return alone_s / (2 * (world_size - 1)), element_s - 8 * byte_s, byte_s


def _all_reduce_s(transport: Transport, numel: int, repeats: int) -> float:
    buffer = torch.zeros(numel, device=transport.device_type)
    return least_s(lambda: transport.all_reduce(buffer, tag=_TAG, what=_WHAT), repeats)


def _repeats(last_s: float) -> int:
    """How often to measure a transfer, by what one a quarter as large took."""
    return _REPEATS if _GROWTH * last_s < _LONG_S else _FEW
