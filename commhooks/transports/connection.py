"""``Connection``: a transport that was asked for by name and opens when it is first needed.

What every user of a transport needs is decided here, once: which name stands for what, how long a wait may
be, and whether the ranks that a transport connects are those of the job.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from .base import DEFAULT_TIMEOUT_S, Transport
from .launcher import launched

NAMES = ("distributed", "gloo", "nccl", "mpi")
"""``"gloo"`` and ``"nccl"`` are ``"distributed"``, and an error where the other one runs."""
OVER_TORCH = NAMES[:3]


def check_name(transport: str | Transport) -> str | Transport:
    """Returns ``transport`` when it is a transport or the name of one, else raises ``ValueError``."""
    if isinstance(transport, Transport) or transport in NAMES:
        return transport
    raise ValueError(f"transport must be one of {NAMES} or a Transport, got {transport!r}")


def make(
    transport: str | Transport,
    *,
    timeout_s: float | None = None,
    process_group: Any = None,
    device_type: str = "cpu",
) -> Transport:
    """Opens a transport by name (a collective call), or returns the one that is given.

    Args:
        transport: one of ``NAMES``, or a ready ``Transport``.
        timeout_s: seconds until a missing peer is an error. None: the process group's timeout, or 300 s
            without a group.
        process_group: ranks of a new ``"distributed"`` transport; default: all.
        device_type: ``"cuda"`` asks ``"distributed"`` for NCCL, when the process group has it, and ``"mpi"``
            to send from GPU memory, when its library can.

    Raises:
        ValueError: ``"gloo"`` or ``"nccl"`` where the other one runs, or MPI connects other ranks than the
            job has.
    """
    if isinstance(transport, Transport):
        return transport
    name = check_name(transport)
    from .distributed import DistributedTransport, backend_for, timeout_of

    if timeout_s is None:
        timeout_s = timeout_of(process_group) or DEFAULT_TIMEOUT_S
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
    """Raises ``ValueError`` where MPI connects other ranks than the job has; closes the transport then.

    A process group that is named must have as many. Otherwise what started the process tells, or the default
    process group: one that agrees suffices, since a job over MPI may have smaller process groups.
    """
    told = []
    if dist.is_available() and dist.is_initialized():
        told.append(("torch's process group", dist.get_world_size(process_group)))
    started = launched()
    if started is not None and process_group is None:
        told.append((started.launcher, started.world_size))
    if not told or any(size == transport.world_size for _, size in told):
        return
    transport.close()
    who, size = told[0]
    raise ValueError(
        f"transport 'mpi' connects {transport.world_size} ranks where {who} has {size}: start the job by the "
        "mpiexec of the MPI library that mpi4py uses (pip's mpich: the one beside the interpreter), or use "
        "transport 'distributed'"
    )


class Connection:
    """Opens a transport once, hands it out, closes it. After :meth:`close` it can be opened again by name.

    Args:
        requested: one of ``NAMES``, or a ready ``Transport``, which is open from the start.

    Attributes:
        requested: what was asked for. Pickled as a name; a pickled connection is closed.
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
        """Whether the transport is open. One opened here is not once its process group was destroyed."""
        return self._transport is not None and (self._transport.is_alive or not self._opened_here)

    def open(
        self, *, timeout_s: float | None = None, process_group: Any = None, device_type: str = "cpu"
    ) -> Transport:
        """The open transport; the first call, a collective one, opens it. Arguments as for :func:`make`."""
        if not self.is_open:
            self.close()
            self._transport = make(
                self.requested, timeout_s=timeout_s, process_group=process_group, device_type=device_type
            )
            self._opened_here = isinstance(self.requested, str)
        return self.transport

    def adopt(self, transport: Transport) -> None:
        """Takes a transport that the caller opened; :meth:`close` closes it. ``requested`` stays as it is."""
        self._transport, self._opened_here = transport, False

    def close(self) -> None:
        """Closes the transport, if it is open. Call it on all ranks."""
        transport, self._transport = self._transport, None  # forgotten even if closing it fails
        if transport is not None:
            transport.close()

    def __getstate__(self) -> dict[str, Any]:
        name = self.requested if isinstance(self.requested, str) else self.requested.name
        return {"requested": name, "_transport": None, "_opened_here": False}
