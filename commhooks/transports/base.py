"""What an aggregator asks of a network: exchange, all-gather, all-reduce and broadcast on buffers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from . import device_copy

DEFAULT_TIMEOUT_S = 300.0
"""Long enough for a rank that evaluates or saves while the others wait for its gradient."""

Message = tuple[int, Tensor]
"""A peer's rank and the contiguous tensor sent to it or received from it."""


@dataclass
class Counters:
    """Traffic of one rank since its transport was made.

    Point-to-point messages are counted as they are. Collectives, whose inner messages no transport shows, are
    counted as their ring forms: all-gather ``(P - 1) * n``, all-reduce ``2 * (P - 1) / P * n``, each way;
    small all-reduces by doubling as the ``log2 P * n`` that they send.
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
    """Moves the bytes of contiguous tensors between ``world_size`` ranks.

    Tensors may be on any device. The network sends from ``device_type``; tensors of another device are copied
    there and back (:mod:`.device_copy`). Every call blocks its thread until it is complete, or raises within
    ``timeout_s``. What arrives on a GPU is complete for what the current stream does next. ``tag`` (0 to
    32767) tells apart messages that are under way at the same time; ``what`` names them in errors ("bucket 3,
    round 1").

    Raises (all calls):
        ValueError: a tensor is not contiguous, or a peer or shape is wrong.
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
        foreign = False
        for peer, buffer in (*sends, *receives):
            if not 0 <= peer < self.world_size or peer == self.rank:
                raise ValueError(f"peer must be another rank below {self.world_size}, got {peer}")
            foreign |= self._is_foreign(buffer)
        if foreign:
            copies = device_copy.Copies(self.device_type)
            outgoing = [(peer, copies.outgoing(buffer)) for peer, buffer in sends]
            incoming = [(peer, copies.incoming(buffer)) for peer, buffer in receives]
            copies.wait()
            self.move(outgoing, incoming, tag, what)
            copies.give_back()
        else:
            self.move(sends, receives, tag, what)
        self.counters.add(sum(nbytes(b) for _, b in sends), sum(nbytes(b) for _, b in receives), len(sends))

    def all_gather(self, send: Tensor, receive: Tensor, *, tag: int, what: str) -> None:
        """``receive[r] = send of rank r``; ``receive`` has shape ``(world_size, *send.shape)``."""
        foreign = self._is_foreign(send) | self._is_foreign(receive)
        if receive.shape != (self.world_size, *send.shape) or receive.dtype != send.dtype:
            raise ValueError(
                f"receive must be {send.dtype} of shape {(self.world_size, *send.shape)}, "
                f"got {receive.dtype} of shape {tuple(receive.shape)}"
            )
        if self.world_size == 1:
            receive[0] = send
            return
        if foreign:
            copies = device_copy.Copies(self.device_type)
            outgoing, incoming = copies.outgoing(send), copies.incoming(receive)
            copies.wait()
            self._all_gather(outgoing, incoming, tag, what)
            copies.give_back()
        else:
            self._all_gather(send, receive, tag, what)
        ring = (self.world_size - 1) * nbytes(send)
        self.counters.add(ring, ring, self.world_size - 1)

    def all_reduce(self, buffer: Tensor, *, tag: int, what: str) -> None:
        """``buffer`` (float32 or int64) becomes the sum over ranks, the same bits on every rank."""
        foreign = self._is_foreign(buffer)
        if self.world_size == 1:
            return
        if foreign:
            copies = device_copy.Copies(self.device_type)
            both = copies.both(buffer)
            copies.wait()
            self._all_reduce(both, tag, what)
            copies.give_back()
        else:
            self._all_reduce(buffer, tag, what)
        each_way, messages = self._all_reduce_traffic(buffer)
        self.counters.add(each_way, each_way, messages)

    def broadcast(self, buffer: Tensor, *, root: int = 0, tag: int, what: str) -> None:
        """``buffer`` becomes rank ``root``'s, by point-to-point messages along a binomial tree."""
        self._is_foreign(buffer)
        copies = device_copy.Copies(self.device_type)
        here = copies.both(buffer)
        copies.wait()
        relative = (self.rank - root) % self.world_size
        step = 1
        while step < self.world_size:
            if relative < step and relative + step < self.world_size:
                child = (self.rank + step) % self.world_size
                self.exchange([(child, here)], [], tag=tag, what=what)
            elif step <= relative < 2 * step:
                parent = (self.rank - step) % self.world_size
                self.exchange([], [(parent, here)], tag=tag, what=what)
            step *= 2
        copies.give_back()

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Within it nothing is added to ``counters``: for checks of settings and for measurements."""
        counted, self.counters = self.counters, Counters()
        try:
            yield
        finally:
            self.counters = counted

    def _is_foreign(self, buffer: Tensor) -> bool:
        """Whether ``buffer`` is on another device. Refuses tensors that are not contiguous."""
        if not buffer.is_contiguous():
            raise ValueError(
                f"buffer must be contiguous, got strides {buffer.stride()} for {tuple(buffer.shape)}"
            )
        return device_copy.is_foreign(buffer, self.device_type)

    @abstractmethod
    def move(self, sends: Sequence[Message], receives: Sequence[Message], tag: int, what: str) -> None:
        """:meth:`exchange` without checks, copies and counting: one round of a collective."""

    @abstractmethod
    def _all_gather(self, send: Tensor, receive: Tensor, tag: int, what: str) -> None: ...

    @abstractmethod
    def _all_reduce(self, buffer: Tensor, tag: int, what: str) -> None: ...

    def _all_reduce_traffic(self, buffer: Tensor) -> tuple[int, int]:
        """Bytes each way and messages of one all-reduce: a ring's."""
        return 2 * (self.world_size - 1) * nbytes(buffer) // self.world_size, 2 * (self.world_size - 1)

    @property
    def is_alive(self) -> bool:
        """False once what the transport works on was taken down by somebody else."""
        return True

    def fail(self, error: BaseException) -> None:
        """Told once that this rank gives up on its peers. A transport may arrange how the process leaves."""

    def close(self) -> None:
        """Frees what the transport holds. Call it on all ranks; calling it twice is fine."""


def nbytes(buffer: Tensor) -> int:
    """Bytes of a tensor's elements."""
    return buffer.numel() * buffer.element_size()
