"""The MPI transport, by mpi4py, which ``pip install commhooks[mpi]`` installs."""

from __future__ import annotations

import array
import atexit
import contextlib
import fcntl
import sys
import termios
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TextIO

import torch
from torch import Tensor

from ..errors import PeerLostError, PeerTimeoutError
from . import finalization, pairwise
from .base import DEFAULT_TIMEOUT_S, Message, Transport, nbytes
from .cuda_aware import is_cuda_aware
from .deadline import Deadline
from .duplicates import duplicate

_SPIN_POLLS = 200  # after so many polls a waiting rank sleeps between polls; before, it only yields the core
_SLEEP_S = 5e-5
_READ_POLL_S = 0.02  # also the time in which a launcher passes on what it has read
_PAIRWISE_BYTES = 16384  # smaller all-reduces are MPI's own, which has fewer rounds
_serialized = threading.Lock()


def load_mpi() -> Any:
    """Imports ``mpi4py.MPI``, which initialises MPI: call it on the main thread.

    Raises:
        ImportError: mpi4py or the MPI library is absent. The message says what to install.
        RuntimeError: MPI was initialised below ``MPI_THREAD_SERIALIZED``.
    """
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise ImportError(
            "transport 'mpi' needs mpi4py and an MPI library: `pip install mpi4py mpich` brings both as "
            f"wheels; or use transport='distributed'. ({error})"
        ) from error
    except RuntimeError as error:  # mpi4py is there, its MPI library is not
        raise ImportError(
            f"mpi4py found no MPI library: `pip install mpich`, or load your system's MPI. ({error})"
        ) from error
    if MPI.Query_thread() < MPI.THREAD_SERIALIZED:
        raise RuntimeError(
            "commhooks calls MPI from a worker thread and needs MPI_THREAD_SERIALIZED or more; set "
            'mpi4py.rc.thread_level = "multiple" before MPI is imported'
        )
    return MPI


class MpiTransport(Transport):
    """Sends over a duplicate of an MPI communicator, so that our messages cannot meet the user's.

    Creating a transport is collective. A closed or garbage-collected transport leaves its duplicate to the
    next transport of the same ranks. Every wait polls against a deadline. After :meth:`fail` the process
    exits through ``COMM_WORLD.Abort``, since ``MPI_Finalize`` would wait for the stalled rank.

    Args:
        comm: an mpi4py communicator whose ranks take part. None: ``COMM_WORLD``.
        timeout_s: seconds until a missing peer is an error.
        device_type: with ``"cuda"``, tensors are sent from GPU memory if the MPI library is CUDA-aware
            (:mod:`~commhooks.transports.cuda_aware`). Otherwise the transport sends from CPU memory, and
            tensors on a GPU are copied through page-locked memory.

    Raises:
        ImportError: mpi4py or the MPI library is absent.
        RuntimeError: MPI was initialised below ``MPI_THREAD_SERIALIZED``.
        CommHooksError: MPI has no communicator left.
    """

    name = "mpi"
    sends_early = True  # libfabric's TCP provider sends a message even before its receive is posted

    def __init__(
        self, comm: Any = None, timeout_s: float = DEFAULT_TIMEOUT_S, device_type: str = "cpu"
    ) -> None:
        self._mpi = load_mpi()
        finalization.watch(self._mpi)
        parent = self._mpi.COMM_WORLD if comm is None else comm
        super().__init__(parent.Get_rank(), parent.Get_size(), timeout_s)
        multiple = self._mpi.Query_thread() >= self._mpi.THREAD_MULTIPLE
        self._lock: Any = contextlib.nullcontext() if multiple else _serialized
        self._duplicate = duplicate(self._mpi, parent, self._complete)
        self._comm = self._duplicate.comm
        self._release = weakref.finalize(self, self._duplicate.release)
        self._release.atexit = False
        self._failed = False
        if device_type == "cuda" and is_cuda_aware(self._mpi):
            self.device_type = "cuda"

    def _complete(self, start: Callable[[], Any]) -> None:
        self._do(lambda: [start()], "opening the transport", "any rank")

    def move(self, sends: Sequence[Message], receives: Sequence[Message], tag: int, what: str) -> None:
        def start() -> list[Any]:
            received = [self._comm.Irecv(_bytes(b), source=p, tag=tag) for p, b in receives]
            return received + [self._comm.Isend(_bytes(b), dest=p, tag=tag) for p, b in sends]

        self._finish_kernels([b for _, b in (*sends, *receives)])
        self._do(start, what, [f"rank {p}" for p, _ in (*receives, *sends)])

    @property
    def is_alive(self) -> bool:
        return self._comm != self._mpi.COMM_NULL and not finalization.is_over(self._mpi)

    def _all_gather(self, send: Tensor, receive: Tensor, tag: int, what: str) -> None:
        self._finish_kernels([send, receive])
        self._do(
            lambda: [self._comm.Iallgather(_bytes(send), _bytes(receive))], f"{what}, all-gather", "any rank"
        )

    def _all_reduce(self, buffer: Tensor, tag: int, what: str) -> None:
        if self.world_size & (self.world_size - 1) and nbytes(buffer) >= _PAIRWISE_BYTES:
            # MPICH sends whole buffers from and back to the ranks beyond a power of two.
            pairwise.all_reduce(self, buffer, tag=tag, what=f"{what}, all-reduce")
            return
        self._finish_kernels([buffer])
        self._do(
            lambda: [self._comm.Iallreduce(self._mpi.IN_PLACE, _array(buffer), op=self._mpi.SUM)],
            f"{what}, all-reduce",
            "any rank",
        )

    def _do(self, start: Callable[[], list[Any]], what: str, peers: list[str] | str) -> None:
        """Starts operations and waits for them. ``start`` returns their requests, ``peers`` as in _wait."""
        with finalization.calls(self.rank, what):
            try:
                with self._lock:
                    requests = start()
            except self._mpi.Exception as error:
                raise PeerLostError(f"rank {self.rank}, {what}: {error}") from error
            self._wait(requests, what, peers)

    def _wait(self, requests: list[Any], what: str, peers: list[str] | str) -> None:
        """Polls until all requests are complete. A timeout error names the peers of the incomplete ones.

        ``peers`` is a list with one name per request, or one text for all.
        """
        deadline, polls = self.deadline(), 0
        while not self._tested(lambda: self._mpi.Request.Testall(requests), what):
            polls += 1
            finalization.check_wait(self.rank, what)
            time.sleep(0 if polls < _SPIN_POLLS else _SLEEP_S)
            if deadline.has_passed():
                if isinstance(peers, list):
                    late = {p for p, r in zip(peers, requests, strict=True) if not self._tested(r.Test, what)}
                    peers = ", ".join(sorted(late))
                raise PeerTimeoutError(
                    f"rank {self.rank}, {what}: no answer from {peers} within {self.timeout_s:g} s"
                )

    def _finish_kernels(self, buffers: Sequence[Tensor]) -> None:
        """Waits for the streams on which ``buffers`` are written and read: MPI ignores streams."""
        for device in {buffer.device for buffer in buffers if buffer.is_cuda}:
            torch.cuda.current_stream(device).synchronize()

    def _tested(self, test: Callable[[], bool], what: str) -> bool:
        try:
            with self._lock:
                return bool(test())
        except self._mpi.Exception as error:
            raise PeerLostError(f"rank {self.rank}, {what}: {error}") from error

    def fail(self, error: BaseException) -> None:
        """Makes the process exit through ``COMM_WORLD.Abort``, which ends all ranks of the job."""
        if not self._failed and self.world_size > 1:
            self._failed = True
            self._release.detach()  # messages may still be under way in the duplicate
            atexit.register(abort, self._mpi)  # runs before mpi4py's own Finalize

    def close(self) -> None:
        """Leaves the duplicate to the next transport of the same ranks: freeing it would need all ranks."""
        self._release()
        self._comm = self._mpi.COMM_NULL


def abort(mpi: Any) -> None:
    """Ends all ranks of the job with exit status 1, unless MPI is finalized.

    Launchers end the ranks without reading what is left in their pipes. So the error's text is given time.
    """
    if not finalization.is_over(mpi):
        if sys.__stderr__ is not None:
            wait_until_read(sys.__stderr__)
        mpi.COMM_WORLD.Abort(1)


def wait_until_read(stream: TextIO, limit_s: float = 2.0) -> None:
    """Waits until the other end of a pipe has read everything, at most ``limit_s``. Files need no wait."""
    try:
        stream.flush()
        deadline, unread = Deadline(limit_s), array.array("i", [1])
        while unread[0] and not deadline.has_passed():
            fcntl.ioctl(stream.fileno(), termios.FIONREAD, unread)
            time.sleep(_READ_POLL_S)
    except (OSError, ValueError):
        return  # closed, or no pipe


def _bytes(buffer: Tensor) -> Any:
    """Returns the tensor's memory as a flat uint8 array, which every MPI can send whatever the dtype."""
    return _array(buffer.detach().view(-1).view(torch.uint8))


def _array(tensor: Tensor) -> Any:
    """Returns what mpi4py accepts: an array of numpy, or a GPU's tensor (``__cuda_array_interface__``)."""
    return tensor if tensor.is_cuda else tensor.numpy()
