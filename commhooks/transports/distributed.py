"""The torch.distributed transport, over a process group of its own: gloo on the CPU, NCCL on GPUs."""

from __future__ import annotations

import os
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import CommHooksError, PeerLostError, PeerTimeoutError, callers_level
from . import pairwise, recursive_doubling
from .base import DEFAULT_TIMEOUT_S, Message, Transport, nbytes
from .deadline import Deadline
from .own_group import OwnGroup
from .stragglers import Stragglers

_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""One name since torch 2.13, where the other is deprecated and warns, and the other name before."""
_POLL_S = 1e-4
"""Seconds of sleep between two polls of a GPU's stream."""
_NO_SLEEP_S = 5e-5
"""Seconds of polling without sleep at first, since a sleep takes longer than most exchanges of NCCL."""
_PAIRWISE_RANKS = 3
"""All-gather is pairwise up to here. gloo's own takes 1.5 (2 ranks) and 1.2 times (3 ranks) as long."""
_LONG_WAIT_S = 1.0
"""Seconds of waiting in a collective after which a rank reports its wait to the others.

It is a quarter of the timeout if that is less.
"""


class DistributedTransport(Transport):
    """Sends over a new process group with the ranks of ``process_group`` and a timeout of its own.

    Creating a transport is collective over those ranks. DDP broadcasts buffers and bitmaps on its own group
    from other threads. On a group of our own, our operations cannot be confused with these.

    Args:
        process_group: the group whose ranks take part. None: all ranks.
        backend: ``"gloo"`` (CPU tensors) or ``"nccl"`` (CUDA tensors).
        timeout_s: seconds until a missing peer is an error. With NCCL this holds for the wait on the device,
            which polls. torch watches the communicator itself.

    Raises:
        RuntimeError: ``init_process_group`` has not been called.
        ValueError: an unknown ``backend``, or ``timeout_s`` is not positive.
    """

    name = "distributed"

    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
        *,
        backend: str = "gloo",
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError("transport 'distributed' needs torch.distributed.init_process_group first")
        if backend not in ("gloo", "nccl"):
            raise ValueError(f"backend must be 'gloo' or 'nccl', got {backend!r}")
        parent = dist.group.WORLD if process_group is None else process_group
        super().__init__(dist.get_rank(parent), dist.get_world_size(parent), timeout_s)
        self.backend = backend
        self.device_type = "cpu" if backend == "gloo" else "cuda"
        self._ranks = dist.get_process_group_ranks(parent)
        self._own = OwnGroup(self._ranks, backend, _group_timeout_s(backend, timeout_s))
        # A transport that is garbage-collected without close() must not keep its connections and threads.
        weakref.finalize(self, self._own.leave_as_garbage).atexit = False
        if backend == "nccl":
            _warn_of_launch_order()
        self._collectives = 0
        store = _store_of(self._own.group) if backend == "gloo" else None
        self._stragglers = Stragglers(store, self.rank, self.world_size)

    def move(self, sends: Sequence[Message], receives: Sequence[Message], tag: int, what: str) -> None:
        self._check_alive(what)
        pending: list[tuple[Any, str]] = []
        name = "any peer"
        try:
            if self.backend == "nccl":
                operations = [dist.P2POp(dist.irecv, b, self._ranks[p], self._own.group) for p, b in receives]
                operations += [dist.P2POp(dist.isend, b, self._ranks[p], self._own.group) for p, b in sends]
                pending = [(work, name) for work in dist.batch_isend_irecv(operations)]
            else:
                for start, messages in ((dist.irecv, receives), (dist.isend, sends)):
                    for peer, b in messages:
                        name = f"rank {peer}"
                        pending.append((start(b, self._ranks[peer], self._own.group, tag), name))
        except RuntimeError as error:
            raise self._typed(error, what, name) from error
        deadline = self.deadline()
        for work, name in pending:
            try:
                self._wait(work, deadline)
            except RuntimeError as error:
                raise self._typed(error, what, name) from error
        for device in {b.device for _, b in (*sends, *receives)}:
            self._wait_for_device(device, what)

    def _all_gather(self, send: Tensor, receive: Tensor, tag: int, what: str) -> None:
        if self.backend == "gloo" and self.world_size <= _PAIRWISE_RANKS:
            pairwise.all_gather(self, send, receive, tag=tag, what=f"{what}, all-gather")
            return
        if self._doubles(send):
            recursive_doubling.all_gather(self, send, receive, tag=tag, what=f"{what}, all-gather")
            return
        flat, mine = receive.view(-1), send.view(-1)
        self._collective(
            lambda: _gather(flat, mine, group=self._own.group, async_op=True),
            send.device,
            what,
            "all-gather",
        )

    def _all_reduce(self, buffer: Tensor, tag: int, what: str) -> None:
        if self._doubles(buffer):
            recursive_doubling.all_reduce(self, buffer, tag=tag, what=f"{what}, all-reduce")
            return
        self._collective(
            lambda: dist.all_reduce(buffer, group=self._own.group, async_op=True),
            buffer.device,
            what,
            "all-reduce",
        )

    def _all_reduce_traffic(self, buffer: Tensor) -> tuple[int, int]:
        if self._doubles(buffer):
            rounds = self.world_size.bit_length() - 1
            return rounds * nbytes(buffer), rounds
        return super()._all_reduce_traffic(buffer)

    def _doubles(self, buffer: Tensor) -> bool:
        power_of_two = self.world_size & (self.world_size - 1) == 0
        return (
            self.backend == "gloo"
            and power_of_two
            and 0 < nbytes(buffer) <= recursive_doubling.DOUBLING_BYTES
        )

    def _collective(self, start: Callable[[], Any], device: torch.device, what: str, operation: str) -> None:
        """Starts a collective and waits for its end. With gloo, an error names the ranks that did not join.

        The late ranks are looked up after a broken connection too: the first rank that gives up breaks the
        connections of the others.
        """
        self._check_alive(what)
        deadline, told = self.deadline(), False
        self._collectives += 1
        try:
            work = start()
            if self.backend == "nccl" or not self._ends_soon(work):
                told = self._stragglers.wait_in(self._collectives)
                self._wait(work, deadline)
        except RuntimeError as error:
            late = self._stragglers.missing(self._collectives) if told else []
            names = " and ".join(f"rank {r}" for r in late) or "any rank"
            raise self._typed(error, f"{what}, {operation}", names) from error
        self._wait_for_device(device, what)

    def _ends_soon(self, work: Any) -> bool:
        """Whether a collective completes without a long wait. False also when it fails."""
        try:
            work.wait(timedelta(seconds=min(_LONG_WAIT_S, self.timeout_s / 4)))
        except RuntimeError:  # after a failure the next wait raises again
            return False
        return True

    def _new_deadline(self) -> Deadline:
        return Deadline(self.timeout_s, by_clock=self.backend == "gloo")  # gloo's waits do not poll

    def _wait(self, work: Any, deadline: Deadline) -> None:
        if self.backend == "nccl":
            work.wait()
        else:
            work.wait(timedelta(seconds=max(1e-3, deadline.left_s())))

    def _wait_for_device(self, device: torch.device, what: str) -> None:
        """Polls the current stream of ``device`` until it is done, within the timeout.

        With gloo there is nothing to wait for.

        ``work.wait()`` of NCCL only orders streams. It returns at once and notices no stalled peer. The
        device is that of the tensors, which need not be the thread's current one.
        """
        if self.backend != "nccl":
            return
        done: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(device))
        deadline = self.deadline()
        sleep_from = time.monotonic() + _NO_SLEEP_S
        while not done.query():
            if time.monotonic() > sleep_from:
                time.sleep(_POLL_S)
            if deadline.has_passed():
                raise PeerTimeoutError(
                    f"rank {self.rank}, {what}: no answer within {self.timeout_s:g} s (NCCL)"
                )

    def _typed(self, error: RuntimeError, what: str, peer: str) -> CommHooksError:
        """Makes a timeout or a lost peer of torch's error, which tells them apart by its text alone."""
        text = str(error)
        if "imed out" in text or "imeout" in text:
            return PeerTimeoutError(
                f"rank {self.rank}, {what}: no answer from {peer} within {self.timeout_s:g} s"
            )
        return PeerLostError(
            f"rank {self.rank}, {what}: lost a connection while waiting for {peer}: {text.split('. ')[0]}"
        )

    @property
    def is_alive(self) -> bool:
        return self._own.is_alive

    def _check_alive(self, what: str) -> None:
        if not self.is_alive:
            raise PeerLostError(
                f"rank {self.rank}, {what}: the process group of this transport was destroyed. After a new "
                "init_process_group register the state with a new DDP model, or make the averager anew"
            )

    def close(self) -> None:
        self._own.close()


def _store_of(group: Any) -> Any:
    """Returns a process group's store. None: torch, which has no public way to it, does not give it."""
    find = getattr(dist.distributed_c10d, "_get_process_group_store", None)
    return None if find is None else find(group)


def backend_for(process_group: dist.ProcessGroup | None, device_type: str) -> str:
    """Returns ``"nccl"`` for CUDA tensors when ``process_group`` sends them by NCCL, else ``"gloo"``.

    The backend is looked up by device: ``init_process_group()`` without a backend chooses one for each
    device.
    """
    if device_type != "cuda" or not dist.is_initialized():
        return "gloo"
    by_device = dict(pair.split(":") for pair in str(dist.get_backend_config(process_group)).split(","))
    return "nccl" if by_device.get("cuda") == "nccl" else "gloo"


def timeout_of(process_group: dist.ProcessGroup | None) -> float | None:
    """Returns the timeout of ``process_group`` (None: the default one) in seconds, or None without a group.

    The timeout is read from the backend's options, since torch has no public way to it.
    """
    if not dist.is_available() or not dist.is_initialized():
        return None
    group: Any = dist.group.WORLD if process_group is None else process_group
    for device in ("cpu", "cuda"):
        try:
            backend = group._get_backend(torch.device(device))
        except RuntimeError:  # the group serves no tensors there
            continue
        timeout = getattr(getattr(backend, "options", None), "_timeout", None)
        if timeout is not None:
            return float(timeout.total_seconds())
    return None


def _group_timeout_s(backend: str, timeout_s: float) -> float:
    """Returns the timeout of our process group in seconds.

    With NCCL it is longer than ours, since torch's watchdog ends the process when it expires. Our error must
    come first.
    """
    return 2 * timeout_s + 60 if backend == "nccl" else timeout_s


def _warn_of_launch_order() -> None:
    """Warns of environment variables that serialise NCCL's launches.

    DDP launches on its own communicator from backward's thread, and the hook launches on ours from the
    state's thread. The order of the two may differ between ranks. Serialised launches may then deadlock.
    """
    risky = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "NCCL_LAUNCH_ORDER_IMPLICIT": "1"}
    for name, value in risky.items():
        if os.environ.get(name) == value:
            warnings.warn(
                f"{name}={value}: DDP's NCCL operations and commhooks' may deadlock "
                f"(find_unused_parameters, SyncBatchNorm, static_graph): unset {name}",
                stacklevel=callers_level(),
            )
