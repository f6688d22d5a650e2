"""Ranks as threads of one process, for property tests and for studies with 64 ranks and more."""

from __future__ import annotations

import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

from ..errors import PeerLostError, PeerTimeoutError
from .base import Message, Transport
from .deadline import Deadline

T = TypeVar("T")
_POLL_S = 0.05
_GRACE_S = 1.0
"""For how long a rank waits for a peer after a third rank has failed. The message may be on its way."""


class _Mailboxes:
    """The queues of a group: one for each (source, destination, tag), made on first use.

    Attributes:
        failed: the errors of ranks that failed, by rank.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._boxes: dict[tuple[int, int, int], queue.SimpleQueue[Tensor]] = defaultdict(queue.SimpleQueue)
        self.failed: dict[int, BaseException] = {}

    def box(self, source: int, destination: int, tag: int) -> queue.SimpleQueue[Tensor]:
        with self._lock:
            return self._boxes[source, destination, tag]


class InProcessTransport(Transport):
    """The transport of one thread. :func:`group` makes one for every rank.

    Sending copies the tensor, so that the sender may reuse it at once.
    """

    name = "in_process"

    def __init__(self, rank: int, world_size: int, mailboxes: _Mailboxes, timeout_s: float) -> None:
        super().__init__(rank, world_size, timeout_s)
        self._mailboxes = mailboxes
        self._goes_on = False  # after it failed: the others are expected to go on too

    def move(self, sends: Sequence[Message], receives: Sequence[Message], tag: int, what: str) -> None:
        if self._goes_on:
            self._mailboxes.failed.pop(self.rank, None)
        for peer, buffer in sends:
            self._mailboxes.box(self.rank, peer, tag).put(buffer.detach().clone())
        deadline = self.deadline()
        for peer, buffer in receives:
            message = self._receive(peer, tag, what, deadline)
            if message.shape != buffer.shape or message.dtype != buffer.dtype:
                raise ValueError(
                    f"rank {self.rank}, {what}: rank {peer} sent {message.dtype} {tuple(message.shape)}, "
                    f"expected {buffer.dtype} {tuple(buffer.shape)}"
                )
            buffer.copy_(message)

    def _receive(self, peer: int, tag: int, what: str, deadline: Deadline) -> Tensor:
        box, failed = self._mailboxes.box(peer, self.rank, tag), self._mailboxes.failed
        step_s, grace_s = min(_POLL_S, self.timeout_s / 4), _GRACE_S
        while True:
            # Read before the box is looked into: what a rank sent before it failed is in there by then.
            errors = {} if self._goes_on else dict(failed)
            try:
                return box.get(timeout=step_s)
            except queue.Empty:
                pass
            grace_s -= step_s if errors else 0.0
            if errors and (peer in errors or grace_s <= 0.0):
                cause = errors.get(peer, next(iter(errors.values())))
                raise PeerLostError(f"rank {self.rank}, {what}: another rank failed") from cause
            if deadline.has_passed():
                raise PeerTimeoutError(
                    f"rank {self.rank}, {what}: nothing from rank {peer} within {self.timeout_s:g} s"
                )

    def _all_gather(self, send: Tensor, receive: Tensor, tag: int, what: str) -> None:
        peers = [r for r in range(self.world_size) if r != self.rank]
        receive[self.rank] = send
        self.move([(p, send) for p in peers], [(p, receive[p]) for p in peers], tag, what)

    def _all_reduce(self, buffer: Tensor, tag: int, what: str) -> None:
        gathered = buffer.new_empty((self.world_size, *buffer.shape))
        self._all_gather(buffer, gathered, tag, what)
        total = gathered[0].clone()
        for row in gathered[1:]:  # in rank order on every rank: the same bits everywhere
            total += row
        buffer.copy_(total)

    def fail(self, error: BaseException) -> None:
        """Ends the waits of all other ranks with ``PeerLostError``. What was sent before is delivered first.

        Waits for ranks that have not failed end a second later. This rank may go on: its later waits end with
        ``PeerTimeoutError`` only.
        """
        self._goes_on = True
        self._mailboxes.failed[self.rank] = error


def group(world_size: int, timeout_s: float = 30.0) -> list[InProcessTransport]:
    """Makes ``world_size`` connected transports, by rank. Each is for one thread.

    Raises:
        ValueError: ``world_size`` is below 1, or ``timeout_s`` is not positive.
    """
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, got {world_size}")
    mailboxes = _Mailboxes()
    return [InProcessTransport(r, world_size, mailboxes, timeout_s) for r in range(world_size)]


def run(world_size: int, work: Callable[[InProcessTransport], T], timeout_s: float = 30.0) -> list[T]:
    """Runs ``work(transport)`` for every rank in a thread of its own and returns the results by rank.

    When a rank raises an exception, the waits of all others end soon with ``PeerLostError``. The exception
    is raised again here: the first one that was raised and is no ``PeerLostError``.
    """
    transports = group(world_size, timeout_s)
    results: list[T | None] = [None] * world_size
    errors: list[BaseException] = []

    def main(transport: InProcessTransport) -> None:
        try:
            results[transport.rank] = work(transport)
        except BaseException as error:
            errors.append(error)
            transport.fail(error)

    threads = [threading.Thread(target=main, args=(t,), name=f"rank {t.rank}") for t in transports]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((e for e in errors if not isinstance(e, PeerLostError)), errors[0])
    return results  # type: ignore[return-value]
