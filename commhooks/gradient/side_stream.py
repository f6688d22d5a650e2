"""The CUDA stream on which a thread works on gradients, beside the stream of backward."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_of_thread = threading.local()


@contextmanager
def stream_after(ready: Any, buffer: Tensor) -> Iterator[None]:
    """On a GPU: this thread's stream on the buffer's device, behind the event ``ready``. On the CPU: nothing.

    A thread has one stream a device for all buckets, since the end of a step works on the memory of all of
    them. A future that is completed inside the block belongs to this stream. Its priority is high: the
    kernels of a selection are short and wait for one another, so behind each wave of backward's kernels they
    would wait again.

    Args:
        ready: what :func:`ready_event` gave; None on the CPU.
        buffer: the gradient. Its memory is not handed out again before this stream is done with it.
    """
    if ready is None:
        yield
        return
    device = buffer.device
    streams: dict[torch.device, Any] = _of_thread.__dict__.setdefault("streams", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
    stream = streams[device]
    with torch.cuda.device(device), torch.cuda.stream(stream):
        stream.wait_event(ready)
        buffer.record_stream(stream)
        yield


def ready_event(buffer: Tensor) -> Any:
    """An event behind all that is queued on the current stream of the buffer's device; None on the CPU.

    The device is the buffer's, which need not be the thread's current one: a model may lie on several GPUs.

    Raises:
        RuntimeError: the stream is being captured into a CUDA graph. The exchange reads results on the host.
    """
    if buffer.device.type != "cuda":
        return None
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a backward pass with commhooks' hook cannot be captured into a CUDA graph: the exchange reads "
            "results on the host. Capture the forward and backward of single modules, inside DDP, instead of "
            "the whole step"
        )
    event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(buffer.device))
    return event


def drain(device: torch.device, limit_s: float) -> bool:
    """Waits until the current stream of ``device`` is done, ``limit_s`` at most; returns whether it is.

    After an error nothing else orders the user's stream behind the work that this one has queued on the
    gradient.
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
