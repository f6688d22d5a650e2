"""The interface of a transport: exchange, all-gather, all-reduce and broadcast of tensors between ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from . import device_copy
from .deadline import Deadline

DEFAULT_TIMEOUT_S = 300.0
"""Seconds: enough for a rank that evaluates or saves while the others wait for its gradient."""

Message = tuple[int, Tensor]
"""A peer's rank and the contiguous tensor sent to it or received from it."""


def check_timeout(timeout_s: float) -> float:
    """Returns ``timeout_s`` as a float when it is positive, else raises ``ValueError``."""
    if not timeout_s > 0:
        raise ValueError(f"timeout_s must be positive, got {timeout_s!r}")
    return float(timeout_s)


@dataclass
class Counters:
    """Traffic of one rank since its transport was made.

    Point-to-point messages are counted exactly. Libraries do not show the messages within a collective on n
    bytes. It is counted as a ring: ``(P - 1) * n`` bytes each way for all-gather and
    ``2 * (P - 1) / P * n`` for all-reduce. An all-reduce by recursive doubling counts as ``log2 P * n``.

    Attributes:
        bytes_sent: bytes.
        bytes_received: bytes.
        messages: number of messages sent.
    """

    bytes_sent: int = 0
    bytes_received: int = 0
    messages: int = 0

    def add(self, sent: int, received: int, messages: int) -> None:
        """Adds ``sent`` and ``received`` bytes and the number of ``messages`` sent."""
        self.bytes_sent += sent
        self.bytes_received += received
        self.messages += messages


class Transport(ABC):
    """Moves the bytes of contiguous tensors between ``world_size`` ranks.

    Tensors may be on the CPU or on a GPU. The network sends from devices of ``device_type``. Other tensors
    are copied there and back (``device_copy.py``). Every call blocks its thread until it is complete, or
    raises. It waits at most ``timeout_s``, all rounds of a collective together. What is received on a GPU is
    complete for later work on the current stream.
    ``tag`` (0 to 32767) distinguishes messages that are under way at the same time. ``what`` names the
    messages in errors ("bucket 3, round 1").

    Args:
        rank: this rank.
        world_size: number of ranks.
        timeout_s: seconds until a missing peer is an error.

    Attributes:
        name: the transport's name.
        device_type: ``"cpu"`` or ``"cuda"``: the devices the network sends from.
        counters: traffic so far.

    Raises (all calls):
        ValueError: a tensor is not contiguous, or a peer or shape is wrong.
        TypeError: a tensor is neither on the CPU nor on a GPU.
        PeerTimeoutError: a peer did not answer in time. The message names the peer where it is known.
        PeerLostError: a connection broke.
    """

    name: ClassVar[str]
    sends_early: ClassVar[bool] = False
    """Whether a message uses the receiver's bandwidth before the receiver has posted its receive."""
    device_type: str = "cpu"
    rank: int
    world_size: int
    timeout_s: float
    _deadline: Deadline | None = None

    def __init__(self, rank: int, world_size: int, timeout_s: float) -> None:
        self.rank, self.world_size, self.timeout_s = rank, world_size, check_timeout(timeout_s)
        self.counters = Counters()

    @contextmanager
    def one_deadline(self) -> Iterator[None]:
        """Lets all waits within the block together take at most ``timeout_s``, and not each by itself.

        A block within another one has the outer one's deadline.
        """
        outer = self._deadline
        self._deadline = outer or self._new_deadline()
        try:
            yield
        finally:
            self._deadline = outer

    @contextmanager
    def shorter_timeout(self, at_most_s: float) -> Iterator[None]:
        """Lets all waits within the block together take at most ``at_most_s``, or ``timeout_s`` if less."""
        usual, self.timeout_s = self.timeout_s, min(self.timeout_s, at_most_s)
        try:
            with self.one_deadline():
                yield
        finally:
            self.timeout_s = usual

    def deadline(self) -> Deadline:
        """Returns the time limit of a wait that begins now: that of :meth:`one_deadline`, or a new one."""
        return self._deadline or self._new_deadline()

    def _new_deadline(self) -> Deadline:
        return Deadline(self.timeout_s)

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message], *, tag: int, what: str) -> None:
        """Sends and receives at the same time, at most one message per direction and peer.

        The tensors of ``receives`` are overwritten.
        """
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
        """Overwrites ``receive[r]`` with ``send`` of rank r.

        ``receive`` has shape ``(world_size, *send.shape)`` and the dtype of ``send``.
        """
        foreign = self._is_foreign(send) | self._is_foreign(receive)
        if receive.shape != (self.world_size, *send.shape) or receive.dtype != send.dtype:
            raise ValueError(
                f"receive must be {send.dtype} of shape {(self.world_size, *send.shape)}, got "
                f"{receive.dtype} of shape {tuple(receive.shape)}"
            )
        if self.world_size == 1:
            receive[0] = send
            return
        if foreign:
            copies = device_copy.Copies(self.device_type)
            outgoing, incoming = copies.outgoing(send), copies.incoming(receive)
            copies.wait()
            with self.one_deadline():
                self._all_gather(outgoing, incoming, tag, what)
            copies.give_back()
        else:
            with self.one_deadline():
                self._all_gather(send, receive, tag, what)
        ring = (self.world_size - 1) * nbytes(send)
        self.counters.add(ring, ring, self.world_size - 1)

    def all_reduce(self, buffer: Tensor, *, tag: int, what: str) -> None:
        """Overwrites ``buffer`` (float32 or int64) with its sum over ranks, bit-identical on every rank."""
        foreign = self._is_foreign(buffer)
        if self.world_size == 1:
            return
        if foreign:
            copies = device_copy.Copies(self.device_type)
            both = copies.both(buffer)
            copies.wait()
            with self.one_deadline():
                self._all_reduce(both, tag, what)
            copies.give_back()
        else:
            with self.one_deadline():
                self._all_reduce(buffer, tag, what)
        each_way, messages = self._all_reduce_traffic(buffer)
        self.counters.add(each_way, each_way, messages)

    def broadcast(self, buffer: Tensor, *, root: int = 0, tag: int, what: str) -> None:
        """Overwrites ``buffer`` with that of rank ``root``.

        Point-to-point messages are sent along a binomial tree.
        """
        if not 0 <= root < self.world_size:
            raise ValueError(f"root must be a rank below {self.world_size}, got {root}")
        self._is_foreign(buffer)
        copies = device_copy.Copies(self.device_type)
        here = copies.both(buffer)
        copies.wait()
        with self.one_deadline():
            self._broadcast(here, root, tag, what)
        copies.give_back()

    def _broadcast(self, here: Tensor, root: int, tag: int, what: str) -> None:
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

    def barrier(self, *, tag: int, what: str) -> None:
        """Waits until all ranks have called it, by point-to-point messages of one byte in ``log2 P`` rounds.

        Unlike an all-reduce it cannot be confused with collectives of ranks that do not call it.
        """
        here = torch.zeros(1, dtype=torch.uint8, device=self.device_type)
        distance = 1
        with self.one_deadline():
            while distance < self.world_size:
                to, source = (
                    (self.rank + distance) % self.world_size,
                    (self.rank - distance) % self.world_size,
                )
                self.exchange([(to, here)], [(source, torch.empty_like(here))], tag=tag, what=what)
                distance *= 2

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Counts no traffic within the block: for checks of settings and for measurements."""
        counted, self.counters = self.counters, Counters()
        try:
            yield
        finally:
            self.counters = counted

    def _is_foreign(self, buffer: Tensor) -> bool:
        """Whether the transport needs a copy of ``buffer``. Raises when ``buffer`` is not contiguous."""
        if not buffer.is_contiguous():
            raise ValueError(
                f"buffer must be contiguous, got strides {buffer.stride()} for {tuple(buffer.shape)}"
            )
        return device_copy.is_foreign(buffer, self.device_type)

    @abstractmethod
    def move(self, sends: Sequence[Message], receives: Sequence[Message], tag: int, what: str) -> None:
        """Does :meth:`exchange` without checks, copies and counting: one round of a collective."""

    @abstractmethod
    def _all_gather(self, send: Tensor, receive: Tensor, tag: int, what: str) -> None:
        """Does :meth:`all_gather` of checked tensors on ``device_type``, between two ranks or more."""

    @abstractmethod
    def _all_reduce(self, buffer: Tensor, tag: int, what: str) -> None:
        """Does :meth:`all_reduce` of a checked tensor on ``device_type``, between two ranks or more."""

    def _all_reduce_traffic(self, buffer: Tensor) -> tuple[int, int]:
        """Bytes each way and number of messages of one all-reduce, counted as a ring."""
        return 2 * (self.world_size - 1) * nbytes(buffer) // self.world_size, 2 * (self.world_size - 1)

    @property
    def is_alive(self) -> bool:
        """False once the transport is unusable, for example after its process group was destroyed."""
        return True

    def fail(self, error: BaseException) -> None:
        """Learns that the rank gives up on its peers. It may change how the process exits."""

    def close(self) -> None:
        """Frees the transport's resources. It needs no other rank. A second call does nothing."""


def nbytes(buffer: Tensor) -> int:
    """Returns the size of a tensor's elements in bytes."""
    return buffer.numel() * buffer.element_size()
