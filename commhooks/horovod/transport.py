"""Opens a transport beside Horovod for a process set: MPI when MPI started the job, else gloo."""

from __future__ import annotations

import atexit
import logging
import os
import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from ..errors import PeerLostError
from ..transports import Transport
from .api import horovod, session, wait_for

logger = logging.getLogger(__name__)

_NO_GROUP, _COVERED, _REFUSED = range(3)  # what a rank votes before a gloo group of a process set is opened
# Horovod's ranks in torch's default process group, and the session it belongs to, if it was opened here.
_opened: tuple[list[int], object] | None = None


def open_transport(requested: str | Transport, process_set: Any, timeout_s: float) -> tuple[Transport, Any]:
    """Opens a transport between the ranks of ``process_set``. A collective call of those ranks.

    Args:
        requested: a name, or a ready transport, which is taken as it is. For ``"distributed"`` the launcher
            decides: MPI under ``mpirun`` and ``horovodrun --mpi`` (where Horovod itself has started MPI),
            otherwise a gloo group of our own. ``"mpi"`` without MPI is an error. ``"gloo"`` is always gloo.
        process_set: a registered process set that includes this rank.
        timeout_s: seconds until a missing peer is an error.

    Returns:
        The transport, and the torch process group it uses (None for MPI).

    Raises:
        ValueError: ``"mpi"`` in a job that MPI did not start, ``"nccl"``, a ready transport of other ranks,
            or, on all ranks of the set, an overlap of process sets that gloo cannot do.
        PeerTimeoutError: over gloo, a rank of the set has not called this after ``timeout_s`` seconds.
        PeerLostError: gloo's connections could not be made.
    """
    hvd = horovod()
    if isinstance(requested, Transport):
        if requested.world_size != process_set.size() or requested.rank != process_set.rank():
            raise ValueError(
                f"transport: rank {requested.rank} of {requested.world_size} does not fit process_set, where "
                f"this is rank {process_set.rank()} of {process_set.size()}"
            )
        return requested, None
    if requested == "nccl":
        raise ValueError(
            "transport 'nccl' was asked for, and under Horovod 'gloo' or 'mpi' runs: write 'distributed'"
        )
    if requested != "gloo" and hvd.mpi_enabled():
        transport = _open_mpi(process_set, timeout_s)
        if transport is not None:
            return transport, None
    elif requested == "mpi":
        raise ValueError(
            "transport='mpi' needs a job started by MPI: run it under mpirun or horovodrun --mpi, or leave "
            "the choice of the transport to the launcher"
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
    """Opens a gloo group of the set's ranks beside Horovod."""
    from ..transports.distributed import DistributedTransport
    from ..transports.own_group import new_group

    if _opened is not None and _opened[1] is not session():
        close_default_group()  # Horovod was reset since
    group, members = None, _default_group_ranks()
    if members is None:
        vote = _NO_GROUP
    else:
        vote = _COVERED if set(process_set.ranks) <= set(members) else _REFUSED
    votes = _votes(vote, process_set, timeout_s)
    if _REFUSED in votes or len(set(votes)) > 1:
        raise ValueError(
            f"process_set {list(process_set.ranks)} overlaps another one: over gloo a process serves one set "
            "and its subsets, and a rank of this one serves other ranks already. Initialize "
            "torch.distributed for all ranks first, numbered as Horovod's, or start the job by MPI"
        )
    if members is None:
        open_default_group(process_set, timeout_s)
    elif len(members) > process_set.size():
        group = new_group([members.index(rank) for rank in process_set.ranks], "gloo", timeout_s)
    return DistributedTransport(group, timeout_s=timeout_s), group


def _default_group_ranks() -> list[int] | None:
    """Returns Horovod's ranks in torch's default group.

    None: there is no group. Empty: the user made it, and numbered its ranks otherwise.
    """
    if not dist.is_initialized():
        return None
    if _opened is not None:
        return _opened[0]
    hvd = horovod()
    same = (dist.get_rank(), dist.get_world_size()) == (hvd.rank(), hvd.size())
    return list(range(hvd.size())) if same else []


def _votes(vote: int, process_set: Any, timeout_s: float) -> list[int]:
    """Gathers every rank's vote, so that all ranks of the set raise alike.

    Raises:
        PeerTimeoutError: a rank has not voted after ``timeout_s`` seconds.
    """
    message = torch.tensor([vote], dtype=torch.int32, device="cpu")
    handle = horovod().allgather_async(message, name="commhooks.open", process_set=process_set)
    votes: list[int] = wait_for(handle, timeout_s, "opening a gloo group").tolist()
    return votes


def open_default_group(process_set: Any, timeout_s: float) -> None:
    """Opens torch's default process group, gloo, over the ranks of ``process_set``.

    It is a collective call of these ranks. The first of them opens a TCP store on a free port. The others
    learn its address by Horovod's ``broadcast_object``.

    Raises:
        PeerLostError: the connections could not be made.
    """
    global _opened
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
    try:
        if store is None:
            store = TCPStore(host, port, size, False, timeout=limit, wait_for_workers=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise PeerLostError(f"rank {hvd.rank()}, opening a gloo group: {reason}") from error
    if _opened is None:
        atexit.register(close_default_group)  # after the optimizers' own, which were registered later
    _opened = list(process_set.ranks), session()


def close_default_group() -> None:
    """Destroys torch's default process group if it was opened here (at exit, and after an elastic reset)."""
    global _opened
    if _opened is not None and dist.is_initialized():
        dist.destroy_process_group()
    _opened = None


def _host() -> str:
    """Returns an address of this machine that the other ranks can reach."""
    hvd = horovod()
    if hvd.local_size() == hvd.size():
        return "127.0.0.1"
    for name in (os.environ.get("HOROVOD_HOSTNAME"), socket.gethostname()):
        try:
            if name and not (found := socket.gethostbyname(name)).startswith("127."):
                return found
        except OSError:
            continue
    # A datagram socket sends nothing when it connects. It is asked for its own end of the route.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        return str(probe.getsockname()[0])
