"""``Connection``: a transport that was asked for by name and opens when it is first needed."""

from __future__ import annotations

from typing import Any

from .base import DEFAULT_TIMEOUT_S, Transport

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


class Connection:
    """Opens a transport once, hands it out, closes it. After :meth:`close` it can be opened again by name.

    Args:
        requested: ``"distributed"``, ``"mpi"``, or a ready ``Transport``, which is open from the start.

    Attributes:
        requested: what was asked for. Pickled as a name; a pickled connection is closed.
    """

    def __init__(self, requested: str | Transport = "distributed") -> None:
        self.requested = check_name(requested)
        self._transport: Transport | None = requested if isinstance(requested, Transport) else None

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
        """Whether the transport is open."""
        return self._transport is not None

    def open(self, *, timeout_s: float, process_group: Any = None, device_type: str = "cpu") -> Transport:
        """The open transport; opens it at the first call, which is collective. Arguments as for :func:`make`."""
        if self._transport is None:
            self._transport = make(
                self.requested, timeout_s=timeout_s, process_group=process_group, device_type=device_type
            )
        return self._transport

    def adopt(self, transport: Transport) -> None:
        """Takes a transport that the caller opened; :meth:`close` closes it. ``requested`` stays as it is."""
        self._transport = transport

    def close(self) -> None:
        """Closes the transport, if it is open. Call it on all ranks."""
        transport, self._transport = self._transport, None  # forgotten even if closing it fails
        if transport is not None:
            transport.close()

    def __getstate__(self) -> dict[str, Any]:
        name = self.requested if isinstance(self.requested, str) else self.requested.name
        return {"requested": name, "_transport": None}
