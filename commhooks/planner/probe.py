"""Measures the costs of the cost model, of network and device, in about a second.

All ranks take part in the same collectives. Whether another one follows is decided by the slowest rank's
time, which all ranks know.
"""

from __future__ import annotations

import torch

from ..gradient.sparse_grad import HEADER_WORDS
from ..transports import Transport
from ..transports.recursive_doubling import DOUBLING_BYTES
from .cost_model import Costs
from .kernel_timing import SMALL_K, SMALL_NUMEL, kernel_costs, least_s, small_bucket_s

_TAG = 32000
_WHAT = "probing for the plan"
_LATENCY_BYTES = 64
_RING_NUMEL = DOUBLING_BYTES // 4 + 1  # the smallest all-reduce that is a ring on every transport
_REPEATS = 6  # the first of them also opens connections and touches memory
_FEW = 3  # repeats where one takes long
_LARGEST_BYTES = 25 << 20  # DDP's bucket
_LONG_S = 0.05  # a transfer this long suffices to measure the bandwidth
_GROWTH = 4  # each size is this many times the last


def probe(transport: Transport, numel: int = 1 << 21, device: torch.device | str = "cpu") -> Costs:
    """Measures the costs of this job, each the slowest rank's, so the same on all. A collective call.

    All ranks measure at the same time, so sharing of cores and links is in the result: use it with
    ``crowding=1``. Of a network measurement's repeats the least counts, of a pass over memory the median. So
    on a busy machine the benefit of compression is underestimated rather than overestimated.

    Args:
        transport: an open transport over the job's ranks.
        numel: parameters of the model. The device is measured on at most 75 MB of them.
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
        # The size of the largest model on any rank: all must do the same number of all-reduces.
        largest_bytes = min(_LARGEST_BYTES, 4 * int(slowest(transport, [float(numel)])[0]))
        ring_step_s, reduce_s, byte_s = _all_reduce(transport, byte_s, largest_bytes)
    select_s, gather_s, write_s, merge_s, *coding = kernel_costs(numel, device, transport.rank)
    bucket_s, dense_bucket_s = _constants(transport, device)
    mine = [message_s, byte_s, ring_step_s, reduce_s, merge_s, select_s, gather_s, write_s]
    return Costs(*slowest(transport, [*mine, bucket_s, dense_bucket_s, *coding]))


def slowest(transport: Transport, mine: list[float]) -> list[float]:
    """Returns each number's maximum over ranks. A collective call."""
    row = torch.tensor(mine, dtype=torch.float64, device="cpu")
    rows = row.new_empty((transport.world_size, row.numel()))
    transport.all_gather(row, rows, tag=_TAG, what=_WHAT)
    return [float(x) for x in rows.max(0).values]


def _constants(transport: Transport, device: torch.device) -> tuple[float, float]:
    """Measures ``(bucket_s, dense_bucket_s)``: the time of small buckets minus that of their collectives.

    A dense bucket goes through the same code as a sparse one and does less in it. Where it seems to take
    longer, the machine was busy, and its constant is the sparse one's.
    """
    pairs = torch.zeros(HEADER_WORDS + 2 * SMALL_K, dtype=torch.int32, device=transport.device_type)
    rows = pairs.new_empty((transport.world_size, pairs.numel()))
    gather_s = least_s(lambda: transport.all_gather(pairs, rows, tag=_TAG, what=_WHAT), 2 * _REPEATS)
    reduce_s = _all_reduce_s(transport, SMALL_NUMEL + 1, 2 * _REPEATS)
    through = [small_bucket_s(transport, device, dense) for dense in (False, True)]
    sparse_s, dense_s, gather_s, reduce_s = slowest(transport, [*through, gather_s, reduce_s])
    bucket_s = max(0.0, sparse_s - gather_s)
    return bucket_s, min(bucket_s, max(0.0, dense_s - reduce_s))


def _link(transport: Transport) -> tuple[float, float]:
    """Measures ``(seconds per message, seconds per byte)``.

    Every rank sends to the next rank and receives from the one before.
    """
    empty_s = slowest(transport, [_shift_s(transport, _LATENCY_BYTES, 4 * _REPEATS)])[0]
    size, last_size, last_s = 1 << 16, _LATENCY_BYTES, empty_s
    while True:
        seconds = slowest(transport, [_shift_s(transport, size, _repeats(last_s))])[0]
        if seconds > _LONG_S or _GROWTH * size > _LARGEST_BYTES:
            break
        size, last_size, last_s = _GROWTH * size, size, seconds
    # The difference of two sizes cancels the burst that a token-bucket rate limit lets through at first.
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
    """Measures ``(seconds per step of a collective, seconds per element added, seconds per byte)``.

    The size does not grow beyond ``largest_bytes``, the model's: a small model fits into caches, where each
    byte is faster. The seconds per byte are ``byte_s``, or less where the all-reduce proves the link faster.
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
    element_s = max(0.0, (seconds - small_s) / (numel - _RING_NUMEL)) / share  # sent both ways, and added
    byte_s = min(byte_s, element_s / 8)
    # Seconds of the 2 (P - 1) steps of a ring without their bytes.
    alone_s = max(0.0, small_s - share * _RING_NUMEL * element_s)
    return alone_s / (2 * (world_size - 1)), element_s - 8 * byte_s, byte_s


def _all_reduce_s(transport: Transport, numel: int, repeats: int) -> float:
    buffer = torch.zeros(numel, dtype=torch.float32, device=transport.device_type)
    return least_s(lambda: transport.all_reduce(buffer, tag=_TAG, what=_WHAT), repeats)


def _repeats(last_s: float) -> int:
    """Returns how often to measure a transfer, when one a quarter as large took ``last_s``."""
    return _REPEATS if _GROWTH * last_s < _LONG_S else _FEW
