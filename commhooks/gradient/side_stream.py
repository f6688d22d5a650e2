"""The CUDA stream on which a thread works on gradients, beside the stream of backward."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_of_thread = threading.local()


@contextmanager
def stream_after(ready: Any, device: torch.device) -> Iterator[None]:
    """On a GPU: this thread's own stream on ``device``, which waits for the event ``ready`` first. On the CPU: nothing.

    A thread has one stream a device for all buckets, since the end of a step works on the memory of all of them. A
    future that is completed inside the block belongs to this stream.

    Args:
        ready: the CUDA event after which the gradient is complete; None on the CPU.
        device: where the gradient is.
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
