"""What an aggregator asks of a network: exchange, all-gather, all-reduce and broadcast on buffers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

DEFAULT_TIMEOUT_S = 300.0
"""Long enough for a rank that evaluates or saves while the others wait for its gradient."""

Message = tuple[int, Tensor]
"""A peer's rank and the contiguous tensor sent to it or received from it."""


@dataclass
class Counters:
    """Traffic of one rank since its transport was made.

    Point-to-point messages are counted as they are. Collectives, whose inner messages no transport shows, are
    counted as their ring forms: all-gather ``(P - 1) * n``, all-reduce ``2 * (P - 1) / P * n``, each way; small
    all-reduces by doubling as the ``log2 P * n`` that they send.
    """

    bytes_sent: int = 0
    bytes_received: int = 0
    messages: int = 0

    def add(self, sent: int, received: int, messages: int) -> None:
        """Counts ``sent`` and ``received`` bytes in ``messages`` messages sent."""
        self.bytes_sent += sent
        self.bytes_received += received
        self.messages += messages


class Transport(ABC):
    """Moves the bytes of contiguous tensors on ``device_type`` between ``world_size`` ranks.

    Every call blocks its thread until it is complete, or raises within ``timeout_s``. ``tag`` tells apart
    messages in pending at the same time (0 to 32767); ``what`` names them in errors ("bucket 3, round 1").

    Raises (all calls):
        PeerTimeoutError: a peer did not answer in time; names it where that can be known.
        PeerLostError: a connection broke.
    """

    name: ClassVar[str]
    sends_early: ClassVar[bool] = False
    """Whether a message takes up its receiver's link before the receiver asks for it."""
    device_type: str = "cpu"
    rank: int
    world_size: int
    timeout_s: float

    def __init__(self, rank: int, world_size: int, timeout_s: float) -> None:
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be positive, got {timeout_s!r}")
        self.rank, self.world_size, self.timeout_s = rank, world_size, float(timeout_s)
        self.counters = Counters()

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message], *, tag: int, what: str) -> None:
        """Sends and receives at the same time, at most one message per direction and peer."""
        for peer, buffer in (*sends, *receives):
            if not 0 <= peer < self.world_size or peer == self.rank:
                raise ValueError(f"peer must be another rank below {self.world_size}, got {peer}")
            self.check_buffer(buffer)
        self._exchange(sends, receives, tag, what)
        self.counters.add(sum(nbytes(b) for _, b in sends), sum(nbytes(b) for _, b in receives), len(sends))

    def all_gather(self, send: Tensor, receive: Tensor, *, tag: int, what: str) -> None:
        """``receive[r] = send of rank r``; ``receive`` has shape ``(world_size, *send.shape)``."""
        self.check_buffer(send)
        self.check_buffer(receive)
        if receive.shape != (self.world_size, *send.shape) or receive.dtype != send.dtype:
            raise ValueError(
                f"receive must be {send.dtype} of shape {(self.world_size, *send.shape)}, "
                f"got {receive.dtype} of shape {tuple(receive.shape)}"
            )
        if self.world_size == 1:
            receive[0] = send
            return
        self._all_gather(send, receive, tag, what)
        ring = (self.world_size - 1) * nbytes(send)
        self.counters.add(ring, ring, self.world_size - 1)

    def all_reduce(self, buffer: Tensor, *, tag: int, what: str) -> None:
        """``buffer`` (float32 or int64) becomes the sum over ranks, the same bits on every rank."""
        self.check_buffer(buffer)
        if self.world_size == 1:
            return
        self._all_reduce(buffer, tag, what)
        each_way, messages = self._all_reduce_traffic(buffer)
        self.counters.add(each_way, each_way, messages)

    def broadcast(self, buffer: Tensor, *, root: int = 0, tag: int, what: str) -> None:
        """``buffer`` becomes rank ``root``'s, by point-to-point messages along a binomial tree."""
        relative = (self.rank - root) % self.world_size
        step = 1
        while step < self.world_size:
            if relative < step and relative + step < self.world_size:
                child = (self.rank + step) % self.world_size
                self.exchange([(child, buffer)], [], tag=tag, what=what)
            elif step <= relative < 2 * step:
                parent = (self.rank - step) % self.world_size
                self.exchange([], [(parent, buffer)], tag=tag, what=what)
            step *= 2

    def check_buffer(self, buffer: Tensor) -> None:
        """Refuses what would be sent wrongly in silence, such as a transposed view."""
        if not buffer.is_contiguous():
            raise ValueError(
                f"buffer must be contiguous, got strides {buffer.stride()} for {tuple(buffer.shape)}"
            )
        if buffer.device.type != self.device_type:
            raise TypeError(f"buffer must be on {self.device_type} for this transport, got {buffer.device}")

    @abstractmethod
    def _exchange(
        self, sends: Sequence[Message], receives: Sequence[Message], tag: int, what: str
    ) -> None: ...

    @abstractmethod
    def _all_gather(self, send: Tensor, receive: Tensor, tag: int, what: str) -> None: ...

    @abstractmethod
    def _all_reduce(self, buffer: Tensor, tag: int, what: str) -> None: ...

    def _all_reduce_traffic(self, buffer: Tensor) -> tuple[int, int]:
        """Bytes each way and messages of one all-reduce: a ring's."""
        return 2 * (self.world_size - 1) * nbytes(buffer) // self.world_size, 2 * (self.world_size - 1)

    def fail(self, error: BaseException) -> None:
        """Told once that this rank gives up on its peers. A transport may arrange how the process leaves."""

    def close(self) -> None:
        """Frees what the transport holds. Call it on all ranks; calling it twice is fine."""


def nbytes(buffer: Tensor) -> int:
    """Bytes of a tensor's elements."""
    return buffer.numel() * buffer.element_size()
