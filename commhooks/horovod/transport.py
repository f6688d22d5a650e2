"""A transport beside Horovod, between the ranks of a process set: MPI when MPI started the job, else gloo."""

from __future__ import annotations

import atexit
import logging
import os
import socket
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from ..transports import Transport
from .api import horovod

logger = logging.getLogger(__name__)

_own_default_group = False  # whether torch's default process group was opened here


def open_transport(requested: str | Transport, process_set: Any, timeout_s: float) -> tuple[Transport, Any]:
    """Opens a transport between the ranks of ``process_set``. A collective call of those ranks.

    Args:
        requested: a name, or a ready transport that is taken as it is. Between ``"mpi"`` and ``"distributed"``
            the launcher decides: over MPI under ``mpirun`` and ``horovodrun --mpi`` (where Horovod itself has
            started MPI), over a gloo group of our own otherwise. Asking for ``"mpi"`` without MPI is an error.
        process_set: a registered process set that includes this rank.
        timeout_s: seconds until a missing peer is an error.

    Returns:
        The transport, and the torch process group it uses (None for MPI).

    Raises:
        ValueError: ``"mpi"`` in a job that MPI did not start, or an overlap of process sets that gloo cannot do.
    """
    hvd = horovod()
    if isinstance(requested, Transport):
        if requested.world_size != process_set.size() or requested.rank != process_set.rank():
            raise ValueError(
                f"transport: rank {requested.rank} of {requested.world_size} does not fit process_set, where this "
                f"is rank {process_set.rank()} of {process_set.size()}"
            )
        return requested, None
    if hvd.mpi_enabled():
        transport = _open_mpi(process_set, timeout_s)
        if transport is not None:
            return transport, None
    elif requested == "mpi":
        raise ValueError(
            "transport='mpi' needs a job started by MPI: run it under mpirun or horovodrun --mpi, or leave the "
            "choice of the transport to the launcher"
        )
    return _open_gloo(process_set, timeout_s)


def _open_mpi(process_set: Any, timeout_s: float) -> Transport | None:
    from ..transports.mpi import MpiTransport, load_mpi

    try:
        mpi = load_mpi()
    except ImportError as error:
        logger.warning("started by MPI but without mpi4py; going over gloo instead. %s", error)
        return None
    hvd, world = horovod(), mpi.COMM_WORLD
    if world.Get_size() != hvd.size() or world.Get_rank() != hvd.rank():
        raise ValueError(
            f"mpi4py is rank {world.Get_rank()} of {world.Get_size()} where Horovod is rank {hvd.rank()} of "
            f"{hvd.size()}: both must use one MPI library (scripts/install_horovod), and hvd.init() the world"
        )
    ranks = list(process_set.ranks)
    if len(ranks) == world.Get_size():
        return MpiTransport(timeout_s=timeout_s)
    group = world.Get_group().Incl(ranks)
    comm = world.Create_group(group, process_set.process_set_id)  # collective over the set alone
    transport = MpiTransport(comm, timeout_s=timeout_s)  # works on a duplicate
    comm.Free()
    group.Free()
    return transport


def _open_gloo(process_set: Any, timeout_s: float) -> tuple[Transport, Any]:
    """A gloo group of the set's ranks beside Horovod."""
    from ..transports.distributed import DistributedTransport

    hvd = horovod()
    group = None
    if not dist.is_initialized():
        open_default_group(process_set, timeout_s)
    elif dist.get_world_size() != process_set.size():
        if dist.get_world_size() != hvd.size():
            raise ValueError(
                "process_set overlaps another one of this process: over gloo a process can serve one set only, "
                "unless torch.distributed was initialized for all ranks before"
            )
        ranks = list(process_set.ranks)
        group = dist.new_group(
            ranks, timeout=timedelta(seconds=timeout_s), backend="gloo", use_local_synchronization=True
        )
    return DistributedTransport(group, timeout_s=timeout_s), group


def open_default_group(process_set: Any, timeout_s: float) -> None:
    """Opens torch's default process group, gloo, over the ranks of ``process_set``; a collective call of them.

    The first rank opens a TCP store on a free port, which travels by Horovod's ``broadcast_object``.
    """
    global _own_default_group
    hvd = horovod()
    root, rank, size = process_set.ranks[0], process_set.rank(), process_set.size()
    if "HOROVOD_GLOO_IFACE" in os.environ:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", os.environ["HOROVOD_GLOO_IFACE"])
    limit = timedelta(seconds=timeout_s)
    store = address = None
    if hvd.rank() == root:
        host = _host()
        store = TCPStore(host, 0, size, True, timeout=limit, wait_for_workers=False)
        address = (host, store.port)
    host, port = hvd.broadcast_object(
        address, root_rank=root, name="commhooks.store", process_set=process_set
    )
    if store is None:
        store = TCPStore(host, port, size, False, timeout=limit, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
    if not _own_default_group:
        atexit.register(close_default_group)  # after the optimizers' own, which were registered later
    _own_default_group = True


def close_default_group() -> None:
    """Destroys torch's default process group if it was opened here (at exit, and before an elastic re-opening)."""
    global _own_default_group
    if _own_default_group and dist.is_initialized():
        dist.destroy_process_group()
    _own_default_group = False


def _host() -> str:
    """An address of this machine that the other ranks can reach."""
    hvd = horovod()
    if hvd.local_size() == hvd.size():
        return "127.0.0.1"
    for name in (os.environ.get("HOROVOD_HOSTNAME"), socket.gethostname()):
        try:
            if name and not (found := socket.gethostbyname(name)).startswith("127."):
                return found
        except OSError:
            continue
    with socket.socket(
        socket.AF_INET, socket.SOCK_DGRAM
    ) as probe:  # sends nothing: asks for the route's address
        probe.connect(("192.0.2.1", 9))
        return str(probe.getsockname()[0])
