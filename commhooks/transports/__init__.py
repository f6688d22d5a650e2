"""Transports: MPI, torch.distributed, and P ranks as threads of one process."""

from __future__ import annotations

from typing import Any

from .base import DEFAULT_TIMEOUT_S, Counters, Message, Transport

__all__ = ["DEFAULT_TIMEOUT_S", "NAMES", "Counters", "Message", "Transport", "check_name", "make"]

NAMES = ("distributed", "mpi")


def check_name(transport: str | Transport) -> str | Transport:
    """Returns ``transport`` when it is a transport or the name of one, else raises ``ValueError``."""
    if isinstance(transport, Transport) or transport in NAMES:
        return transport
    raise ValueError(f"transport must be one of {NAMES} or a Transport, got {transport!r}")


def make(
    transport: str | Transport,
    *,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    process_group: Any = None,
    device_type: str = "cpu",
) -> Transport:
    """Opens a transport by name (a collective call), or returns the one that is given.

    Args:
        transport: ``"mpi"``, ``"distributed"`` or a ready ``Transport``.
        timeout_s: seconds until a missing peer is an error.
        process_group: ranks of a new ``"distributed"`` transport; default: all.
        device_type: ``"cuda"`` asks ``"distributed"`` for NCCL, when the process group has it, and ``"mpi"`` to
            send from GPU memory, when its library can.
    """
    if isinstance(transport, Transport):
        return transport
    if check_name(transport) == "mpi":
        from .mpi import MpiTransport

        return MpiTransport(timeout_s=timeout_s, device_type=device_type)
    from .distributed import DistributedTransport, backend_for

    backend = backend_for(process_group, device_type)
    return DistributedTransport(process_group, backend=backend, timeout_s=timeout_s)
