"""The CUDA stream on which a thread processes gradients, next to the stream of backward."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

PRIORITY = -1
"""Of a thread's stream. The kernels of a selection are short and depend on one another.

At equal priority, 0, each of them could wait behind kernels of backward.
"""

_of_thread = threading.local()


@contextmanager
def stream_after(ready: Any, buffer: Tensor) -> Iterator[None]:
    """Makes this thread's own stream current within the block, after the event ``ready``.

    The stream is on the buffer's device. Without an event (CPU) nothing changes. A thread has one stream per
    device for all buckets, because the end of a step processes the memory of all of them. A future that
    is completed inside the block is ordered by this stream. Its priority is :data:`PRIORITY`.

    Args:
        ready: what :func:`ready_event` returned; None on the CPU.
        buffer: the gradient. Its memory is not reused before this stream is done with it.
    """
    if ready is None:
        yield
        return
    device = buffer.device
    streams: dict[torch.device, Any] = _of_thread.__dict__.setdefault("streams", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device, priority=PRIORITY)  # type: ignore[no-untyped-call]
    stream = streams[device]
    with torch.cuda.device(device), torch.cuda.stream(stream):
        stream.wait_event(ready)
        buffer.record_stream(stream)
        yield


def ready_event(buffer: Tensor) -> Any:
    """Records an event on the current stream of the buffer's device and returns it; None on the CPU.

    The buffer's device need not be the thread's current one, since a model may be on several GPUs.

    Raises:
        RuntimeError: the stream is being captured into a CUDA graph. The exchange reads results on the host.
    """
    if buffer.device.type != "cuda":
        return None
    with torch.cuda.device(buffer.device):
        captured = torch.cuda.is_current_stream_capturing()
    if captured:
        raise RuntimeError(
            "a backward pass with commhooks' hook cannot be captured into a CUDA graph: the exchange reads "
            "results on the host. Capture the forward and backward of single modules, inside DDP, instead of "
            "the whole step"
        )
    event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(buffer.device))
    return event


def drain(device: torch.device, limit_s: float) -> bool:
    """Waits at most ``limit_s`` seconds until the current stream of ``device`` is done.

    It is called after an error. Then nothing else makes the user's stream wait for the work that this stream
    has queued on the gradient.

    Returns:
        Whether the stream is done; True on the CPU.
    """
    if device.type != "cuda":
        return True
    done: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record(torch.cuda.current_stream(device))
    deadline = time.monotonic() + limit_s
    while not done.query():
        if time.monotonic() > deadline:
            return False
        time.sleep(1e-4)
    return True
