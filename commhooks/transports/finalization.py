"""Lets running exchanges end before MPI is finalized, and refuses exchanges after that.

Any thread may finalize MPI while another one exchanges. Horovod does: when one rank calls ``hvd.shutdown()``
or exits, a thread of Horovod finalizes MPI on every rank. A call of MPI during or after that ends the process
with "Attempting to use an MPI routine after finalizing" or a segmentation fault. ``MPI_Finalize`` begins with
the deletion of the attributes of ``COMM_SELF``, while MPI still works. So the deletion of an attribute waits.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from ..errors import PeerLostError
from .deadline import Deadline

GRACE_S = 10.0
"""Seconds for which the end of MPI waits for exchanges that are under way on this rank."""
_POLL_S = 1e-3
_WHY = "MPI is being finalized, because a rank of the job has exited or called hvd.shutdown()"


class Exchanger(Protocol):
    """What :func:`add_exchanger` takes."""

    @property
    def is_exchanging(self) -> bool:
        """Whether an exchange is under way on this rank."""


class _Progress:
    """How far the end of MPI has come in this process, and how many calls are under way.

    Attributes:
        lock: held where ``watched``, ``calls`` or ``no_calls`` change.
        watched: whether the end of MPI waits for this module.
        no_calls: whether new calls are refused.
        no_waits: whether calls that wait for other ranks give up.
        calls: the number of calls under way.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.watched = self.no_calls = self.no_waits = False
        self.calls = 0


_progress = _Progress()
_exchangers: weakref.WeakSet[Any] = weakref.WeakSet()


def watch(mpi: Any) -> None:
    """Makes the end of MPI wait for :func:`calls` of this process. Later calls of ``watch`` do nothing.

    Args:
        mpi: the module ``mpi4py.MPI``, initialized.
    """
    with _progress.lock:
        first, _progress.watched = not _progress.watched, True
    if first:
        mpi.COMM_SELF.Set_attr(mpi.Comm.Create_keyval(delete_fn=_before_the_end), True)


def add_exchanger(exchanger: Exchanger) -> None:
    """Makes the end of MPI wait for the exchanges of ``exchanger``, which is held weakly."""
    _exchangers.add(exchanger)


@contextmanager
def calls(rank: int, what: str) -> Iterator[None]:
    """Wraps calls of MPI that may wait for other ranks.

    Raises:
        PeerLostError: MPI is at its end. The text names ``rank`` and ``what``.
    """
    with _progress.lock:
        if _progress.no_calls:
            raise PeerLostError(f"rank {rank}, {what}: {_WHY}")
        _progress.calls += 1
    try:
        yield
    finally:
        with _progress.lock:
            _progress.calls -= 1


def check_wait(rank: int, what: str) -> None:
    """Checks, at every poll inside :func:`calls`, whether the wait may go on.

    Raises:
        PeerLostError: MPI is at its end and has waited for ``GRACE_S``.
    """
    if _progress.no_waits:
        raise PeerLostError(f"rank {rank}, {what}: {_WHY}")


def is_over(mpi: Any) -> bool:
    """Whether MPI is finalized, or so close to it that nothing may be called any more."""
    return _progress.no_calls or bool(mpi.Is_finalized())


def _before_the_end(comm: Any, keyval: int, value: Any) -> None:
    """Waits for exchanges and calls under way. MPI calls it first of all, inside ``MPI_Finalize``."""
    grace = Deadline(GRACE_S)
    while any(e.is_exchanging for e in list(_exchangers)) and not grace.has_passed():
        time.sleep(_POLL_S)
    while not _refuse_calls():
        _progress.no_waits = _progress.no_waits or grace.has_passed()
        time.sleep(_POLL_S)


def _refuse_calls() -> bool:
    """Refuses new calls from now on, if none is under way. Returns whether it does."""
    with _progress.lock:
        _progress.no_calls = _progress.calls == 0
        return _progress.no_calls
