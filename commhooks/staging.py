"""The device of the gradients beside the device a transport can send from: copies and streams."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .sparse import SparseGrad
from .transports import Transport

_of_thread = threading.local()


def to_transport(pairs: SparseGrad, transport: Transport) -> SparseGrad:
    """``pairs`` where ``transport`` can send them; from a GPU through pinned memory, by this stream."""
    device = pairs.values.device
    if device.type == transport.device_type:
        return pairs
    if device.type != "cuda":
        return pairs.to(torch.device(transport.device_type))
    staged = SparseGrad(_pinned(pairs.values), _pinned(pairs.indices), pairs.numel)
    torch.cuda.current_stream(device).synchronize()
    return staged


def _pinned(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


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
