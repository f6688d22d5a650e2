"""Copies between the device of a caller's tensors and the device a transport sends from.

Copies between a GPU and the host use page-locked host memory. Both directions are queued on the current
stream and run on the GPU's copy engine. Torch's caching host allocator owns the page-locked memory: it keeps
blocks by size between steps, and hands a block out again only after the copies queued on it are done.
"""

from __future__ import annotations

import torch
from torch import Tensor


def is_foreign(buffer: Tensor, device_type: str) -> bool:
    """Whether a transport that sends from ``device_type`` needs a copy of ``buffer``.

    Raises:
        TypeError: ``buffer`` is neither on the CPU nor on a CUDA device.
    """
    found = buffer.device.type
    if found == device_type:
        return False
    if found not in ("cpu", "cuda"):
        raise TypeError(f"buffer must be on the CPU or on a CUDA device, got {buffer.device}")
    return True


class Copies:
    """The buffers of one transport call, copied to the transport's device and back.

    Args:
        device_type: where the transport sends from.
    """

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type
        self._returns: list[tuple[Tensor, Tensor]] = []  # (the caller's buffer, the transport's copy)
        self._devices: set[torch.device] = set()  # GPUs on whose streams copies to the host are queued

    def outgoing(self, buffer: Tensor) -> Tensor:
        """Returns a copy of ``buffer`` on the transport's device, complete after :meth:`wait`.

        Returns ``buffer`` itself when it is there already.
        """
        if not is_foreign(buffer, self._device_type):
            return buffer
        if self._device_type != "cpu":
            return buffer.to(self._device_type)
        copy = _on_host(buffer)
        _queue_copy(copy, buffer)
        self._devices.add(buffer.device)
        return copy

    def incoming(self, buffer: Tensor) -> Tensor:
        """Returns a tensor on the transport's device to receive in.

        :meth:`give_back` copies it into ``buffer``. It is ``buffer`` itself when that is there already.
        """
        if not is_foreign(buffer, self._device_type):
            return buffer
        if self._device_type == "cpu":
            copy = _on_host(buffer)
        else:
            copy = torch.empty_like(buffer, device=self._device_type)
        self._returns.append((buffer, copy))
        return copy

    def both(self, buffer: Tensor) -> Tensor:
        """Returns a copy of ``buffer`` for the transport to overwrite.

        :meth:`give_back` copies it back. It is ``buffer`` itself when that is on the transport's device.
        """
        copy = self.outgoing(buffer)
        if copy is not buffer:
            self._returns.append((buffer, copy))
        return copy

    def wait(self) -> None:
        """Waits until the outgoing copies are complete, once for each GPU."""
        for device in self._devices:
            _wait_for_stream(device)

    def give_back(self) -> None:
        """Copies what was received into the caller's buffers.

        On a GPU the copies are queued: they are complete for later work on the current stream.
        """
        for buffer, copy in self._returns:
            if self._device_type == "cpu":
                _queue_copy(buffer, copy)
            else:
                buffer.copy_(copy)


def _on_host(like: Tensor) -> Tensor:
    """Makes page-locked memory of ``like``'s shape and dtype."""
    return torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=True)


def _queue_copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source, non_blocking=True)


def _wait_for_stream(device: torch.device) -> None:
    torch.cuda.current_stream(device).synchronize()
