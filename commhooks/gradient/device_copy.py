"""The device of the gradients beside the device a transport can send from: copies both ways, and streams.

Where they differ, what is sent leaves a GPU into page-locked memory and what comes back enters it from there: both copies
are queued on the current stream, by the GPU's copy engine. The memory is torch's to keep: its caching host allocator holds
page-locked blocks between steps, by size, and gives none out again before the copies queued on it are done.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..transports import Transport
from .sparse_grad import SparseGrad

_of_thread = threading.local()


def to_transport(pairs: SparseGrad, transport: Transport) -> SparseGrad:
    """``pairs`` where ``transport`` can send them; from a GPU complete when this returns."""
    device = pairs.values.device
    if not _crosses(device, transport.device_type):
        return (
            pairs if device.type == transport.device_type else pairs.to(torch.device(transport.device_type))
        )
    staged = SparseGrad(_to_host(pairs.values), _to_host(pairs.indices), pairs.numel)
    _wait_for_copies(device)
    return staged


def send_buffer(values: Tensor, extra: int, transport: Transport) -> Tensor:
    """A new tensor ``(n + extra,)`` that ``transport`` can send: ``values`` (n,), then places for the caller to fill."""
    if _crosses(values.device, transport.device_type):
        buffer = _to_host(values, extra)
        _wait_for_copies(values.device)
        return buffer
    here = values.device.type == transport.device_type
    device = values.device if here else torch.device(transport.device_type)
    buffer = torch.empty(values.numel() + extra, dtype=values.dtype, device=device)
    buffer[: values.numel()] = values
    return buffer


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``, itself when it is there; on a GPU complete for what this stream does next."""
    if not _crosses(device, tensor.device.type):
        return tensor.to(device)
    if not tensor.is_pinned():  # an aggregator's own result; what send_buffer made goes as it is
        tensor = _page_locked(tensor.numel(), tensor.dtype).view(tensor.shape).copy_(tensor)
    return tensor.to(device, non_blocking=True)


def pairs_to_device(pairs: SparseGrad, device: torch.device) -> SparseGrad:
    """``pairs`` on ``device``, as by :func:`to_device`."""
    return SparseGrad(to_device(pairs.values, device), to_device(pairs.indices, device), pairs.numel)


def _crosses(device: torch.device, other: str) -> bool:
    """Whether there is a GPU on one side, ``device``, and the host on the other."""
    return device.type == "cuda" and other == "cpu"


def _to_host(tensor: Tensor, extra: int = 0) -> Tensor:
    """A flat copy with ``extra`` places behind it; on its way until :func:`_wait_for_copies`."""
    host = _page_locked(tensor.numel() + extra, tensor.dtype)
    host[: tensor.numel()].copy_(tensor, non_blocking=True)
    return host


def _page_locked(numel: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(numel, dtype=dtype, pin_memory=True)


def _wait_for_copies(device: torch.device) -> None:
    torch.cuda.current_stream(device).synchronize()


@contextmanager
def stream_after(ready: Any, device: torch.device) -> Iterator[None]:
    """On a GPU: a stream of this thread's own that waits for the gradient; the future completes inside it.

    It is the same stream for all buckets: the end of a step works on the memory of every one of them.
    """
    if ready is None:
        yield
        return
    streams: dict[torch.device, Any] = _of_thread.__dict__.setdefault("streams", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream = streams[device]
    with torch.cuda.device(device), torch.cuda.stream(stream):
        stream.wait_event(ready)
        yield
