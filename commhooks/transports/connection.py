"""``Connection``: a transport that is requested by name and opened when it is first needed.

This module decides for all users of transports what each name stands for, what the timeout is, and whether a
transport connects the ranks of the job.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from .base import DEFAULT_TIMEOUT_S, Transport
from .launcher import SIZE_VARIABLES, launched

NAMES = ("distributed", "gloo", "nccl", "mpi")
"""The accepted names. ``"gloo"`` and ``"nccl"`` are ``"distributed"`` with that backend required."""
OVER_TORCH = NAMES[:3]


def check_name(transport: str | Transport) -> str | Transport:
    """Returns ``transport`` when it is a transport or the name of one, else raises ``ValueError``."""
    if isinstance(transport, Transport) or transport in NAMES:
        return transport
    raise ValueError(f"transport must be one of {NAMES} or a Transport, got {transport!r}")


def default_timeout(process_group: Any = None) -> float:
    """Returns the seconds of a wait without a timeout of its own: the process group's, or 300 without one.

    Args:
        process_group: None: the default one.
    """
    from .distributed import timeout_of

    return timeout_of(process_group) or DEFAULT_TIMEOUT_S


def make(
    transport: str | Transport,
    *,
    timeout_s: float | None = None,
    process_group: Any = None,
    device_type: str = "cpu",
) -> Transport:
    """Opens a transport by name, which is collective, or returns the transport that is given.

    Args:
        transport: one of ``NAMES``, or a ready ``Transport``.
        timeout_s: seconds until a missing peer is an error. None: the process group's timeout, or 300 s
            without a group.
        process_group: the process group whose ranks a new ``"distributed"`` transport connects. None: all
            ranks.
        device_type: where the gradients are. With ``"cuda"``, ``"distributed"`` uses NCCL if the process
            group has it, and ``"mpi"`` sends from GPU memory if the MPI library can.

    Raises:
        ValueError: an unknown name, ``"gloo"`` or ``"nccl"`` where the other one is in use, or MPI connects
            another number of ranks than ``process_group`` has, or without one than the default process group
            or the launcher has.
        RuntimeError: ``"distributed"`` before ``init_process_group``.
        ImportError: ``"mpi"`` without mpi4py or an MPI library.
    """
    if isinstance(transport, Transport):
        return transport
    name = check_name(transport)
    from .distributed import DistributedTransport, backend_for

    if timeout_s is None:
        timeout_s = default_timeout(process_group)
    if name == "mpi":
        from .mpi import MpiTransport

        connected = MpiTransport(timeout_s=timeout_s, device_type=device_type)
        _check_ranks(connected, process_group)
        return connected
    backend = backend_for(process_group, device_type)
    if name not in ("distributed", backend):
        raise ValueError(
            f"transport {name!r} was asked for, and {backend!r} is what runs here, for gradients on "
            f"{device_type} and this process group: write {backend!r} or 'distributed'"
        )
    return DistributedTransport(process_group, backend=backend, timeout_s=timeout_s)


def _check_ranks(transport: Transport, process_group: Any) -> None:
    """Closes the transport and raises ``ValueError`` when its number of ranks is not the job's.

    A given ``process_group`` must have as many ranks as the transport. Without one, the default process group
    and the launcher must both have as many, as far as they are known.
    """
    told = []
    if dist.is_available() and dist.is_initialized():
        told.append(("torch's process group", dist.get_world_size(process_group)))
    started = launched()
    # A group that was named may be a part of the job, and then says nothing of what the launcher started.
    # Of nested launchers the innermost counts: mpiexec in an allocation of Slurm, torchrun in a rank of MPI.
    # A single process cannot contradict an MPI that connects several. Its variables were inherited, as in a
    # shell that srun or Kubernetes started and in which somebody called mpiexec.
    if process_group is None and started is not None and not started.world_size == 1 < transport.world_size:
        told.append((started.launcher, started.world_size))
    wrong = [(who, size) for who, size in told if size != transport.world_size]
    if not wrong:
        return
    transport.close()
    who, size = wrong[0]
    inherited = SIZE_VARIABLES.get(who)
    raise ValueError(
        f"transport 'mpi' connects {transport.world_size} ranks where {who} has {size}: start the job by the "
        "mpiexec of the MPI library that mpi4py uses (pip's mpich: the one beside the interpreter), or use "
        "transport 'distributed'"
        + ("" if inherited is None else f". If {who} did not start this process, unset {inherited}")
    )


class Connection:
    """Opens a transport once, returns it to its users and closes it.

    After :meth:`close` a transport that was requested by name can be opened again.

    Args:
        requested: one of ``NAMES``, or a ready ``Transport``, which is open from the start.

    Attributes:
        requested: what was requested. It is pickled as a name, and an unpickled connection is closed.
    """

    def __init__(self, requested: str | Transport = "distributed") -> None:
        self.requested = check_name(requested)
        self._transport: Transport | None = requested if isinstance(requested, Transport) else None
        self._opened_here = False

    @property
    def transport(self) -> Transport:
        """The open transport.

        Raises:
            RuntimeError: it is not open yet.
        """
        if self._transport is None:
            raise RuntimeError("the transport is not open yet: it opens at the first step or by register()")
        return self._transport

    @property
    def is_open(self) -> bool:
        """Whether the transport is open.

        One that was opened here counts as closed once its process group was destroyed.
        """
        return self._transport is not None and (self._transport.is_alive or not self._opened_here)

    def open(
        self, *, timeout_s: float | None = None, process_group: Any = None, device_type: str = "cpu"
    ) -> Transport:
        """Returns the open transport. Opens it first if it is closed, which is collective.

        Arguments and errors are those of :func:`make`.
        """
        if not self.is_open:
            self.close()
            self._transport = make(
                self.requested, timeout_s=timeout_s, process_group=process_group, device_type=device_type
            )
            self._opened_here = isinstance(self.requested, str)
        return self.transport

    def adopt(self, transport: Transport) -> None:
        """Takes over an open transport of the caller. :meth:`close` closes it. ``requested`` stays."""
        self._transport, self._opened_here = transport, False

    def close(self) -> None:
        """Closes the transport, if it is open. It needs no other rank."""
        transport, self._transport = self._transport, None  # dropped even if closing it fails
        if transport is not None:
            transport.close()

    def __getstate__(self) -> dict[str, Any]:
        name = self.requested if isinstance(self.requested, str) else self.requested.name
        return {"requested": name, "_transport": None, "_opened_here": False}
