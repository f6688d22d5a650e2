"""torch.distributed (gloo for CPU tensors, NCCL for CUDA tensors) over a process group of our own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import CommHooksError, PeerLostError, PeerTimeoutError
from .base import DEFAULT_TIMEOUT_S, Message, Transport

_POLL_S = 1e-4


class DistributedTransport(Transport):
    """A new process group over the ranks of ``process_group`` (default: all), with a timeout of its own.

    DDP issues broadcasts and bitmaps on its own group from other threads; ours never meet them. Making one is
    collective over those ranks.

    Args:
        process_group: whose ranks take part.
        backend: ``"gloo"`` (CPU tensors) or ``"nccl"`` (CUDA tensors).
        timeout_s: seconds until a missing peer is an error. Under NCCL best effort: the wait on the device is
            polled, the communicator itself is watched by torch.
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
        self._group: Any = dist.new_group(
            self._ranks,
            timeout=timedelta(seconds=timeout_s),
            backend=backend,
            use_local_synchronization=self.world_size < dist.get_world_size(),
        )

    def _exchange(self, sends: Sequence[Message], receives: Sequence[Message], tag: int, what: str) -> None:
        pending: list[tuple[Any, str]] = []
        if self.backend == "nccl":
            operations = [dist.P2POp(dist.irecv, b, self._ranks[p], self._group) for p, b in receives]
            operations += [dist.P2POp(dist.isend, b, self._ranks[p], self._group) for p, b in sends]
            pending = [(work, "any peer") for work in dist.batch_isend_irecv(operations)]
        else:
            try:
                for peer, b in receives:
                    pending.append((dist.irecv(b, self._ranks[peer], self._group, tag), f"rank {peer}"))
                for peer, b in sends:
                    pending.append((dist.isend(b, self._ranks[peer], self._group, tag), f"rank {peer}"))
            except RuntimeError as error:
                raise self._typed(error, what, f"rank {peer}") from error
        deadline = time.monotonic() + self.timeout_s
        for work, name in pending:
            self._wait(work, deadline, what, name)
        self._wait_for_device(deadline, what)

    def _all_gather(self, send: Tensor, receive: Tensor, tag: int, what: str) -> None:
        rows = list(receive.unbind(0))
        self._collective(
            lambda: dist.all_gather(rows, send, group=self._group, async_op=True), what, "all-gather"
        )

    def _all_reduce(self, buffer: Tensor, tag: int, what: str) -> None:
        self._collective(
            lambda: dist.all_reduce(buffer, group=self._group, async_op=True), what, "all-reduce"
        )

    def _collective(self, start: Any, what: str, operation: str) -> None:
        deadline = time.monotonic() + self.timeout_s
        try:
            work = start()
        except RuntimeError as error:
            raise self._typed(error, f"{what}, {operation}", "any rank") from error
        self._wait(work, deadline, f"{what}, {operation}", "any rank")
        self._wait_for_device(deadline, what)

    def _wait(self, work: Any, deadline: float, what: str, peer: str) -> None:
        remaining = max(1e-3, deadline - time.monotonic())
        try:
            if self.backend == "nccl":
                work.wait()
            else:
                work.wait(timedelta(seconds=remaining))
        except RuntimeError as error:
            raise self._typed(error, what, peer) from error

    def _wait_for_device(self, deadline: float, what: str) -> None:
        """NCCL's wait only orders streams: poll the stream itself, so that a stall is seen in time."""
        if self.backend != "nccl":
            return
        done: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        while not done.query():
            time.sleep(_POLL_S)
            if time.monotonic() > deadline:
                raise PeerTimeoutError(f"rank {self.rank}, {what}: no answer for {self.timeout_s:g} s (NCCL)")

    def _typed(self, error: RuntimeError, what: str, peer: str) -> CommHooksError:
        text = str(error)
        if "imed out" in text or "imeout" in text:
            return PeerTimeoutError(
                f"rank {self.rank}, {what}: no answer from {peer} for {self.timeout_s:g} s"
            )
        return PeerLostError(
            f"rank {self.rank}, {what}: lost the connection to {peer}: {text.split('. ')[0]}"
        )

    def close(self) -> None:
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._group = None


def backend_for(process_group: dist.ProcessGroup | None, device_type: str) -> str:
    """``"nccl"`` for CUDA tensors when ``process_group`` itself runs NCCL, else ``"gloo"``."""
    if device_type != "cuda" or not dist.is_initialized():
        return "gloo"
    return "nccl" if "nccl" in str(dist.get_backend(process_group)) else "gloo"
