"""On a rank: joining the others, and what all ranks find out together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from .launch import ADDRESS


def join() -> tuple[int, int]:
    """Starts MPI and a gloo process group over the same ranks; returns (rank, world size)."""
    import mpi4py

    mpi4py.rc.thread_level = "multiple"
    from mpi4py import MPI

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    comm = MPI.COMM_WORLD
    rank, size = comm.Get_rank(), comm.Get_size()
    host, store = os.environ[ADDRESS], None
    if rank == 0:
        store = dist.TCPStore(host, 0, size, True, wait_for_workers=False)
    port = comm.bcast(store.port if store else None)
    if rank:
        store = dist.TCPStore(host, port, size, False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    return rank, size


def settle() -> None:
    """A gloo barrier: the same few bytes for every scheme. Ranks sleep in it, where MPI's takes a core."""
    dist.barrier()


def all_ranks(mine: bool) -> bool:
    """Whether `mine` holds on every rank. A collective call."""
    vote = torch.tensor([int(mine)])
    dist.all_reduce(vote, op=dist.ReduceOp.MIN)
    return bool(vote)


def largest(values: Sequence[float]) -> list[float]:
    """Element by element the largest over ranks. A collective call."""
    table = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(table, op=dist.ReduceOp.MAX)
    return [float(value) for value in table]


def interface_bytes() -> int:
    """Bytes that this host's interface has sent."""
    return int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text())


class NotCrossedError(RuntimeError):
    """Ranks found each other by another way than the network whose limit was set."""


def check_crossed(counted_bytes: float, interface_bytes: float, what: str) -> None:
    """All ranks' interfaces together must have sent what the transports counted. A collective call.

    Together, because the count of a library's own all-reduce is an average: some of its ranks may send less.

    Args:
        counted_bytes: what this rank's transport counted, 0 where nobody counts.
        interface_bytes: what this rank's interface sent in the same time.
        what: was measured, for the message.

    Raises:
        NotCrossedError: on all ranks, with more than one rank, if they sent less.
    """
    sums = torch.tensor([counted_bytes, interface_bytes], dtype=torch.float64)
    dist.all_reduce(sums)
    counted, sent = sums.tolist()
    if dist.get_world_size() > 1 and sent < counted:
        raise NotCrossedError(
            f"{what}: the ranks counted {counted:.0f} bytes, their interfaces sent {sent:.0f}: "
            "the traffic did not cross the network. MPICH needs MPIR_CVAR_NOLOCAL=1, "
            "MPIR_CVAR_CH4_NETMOD=ofi, FI_PROVIDER=tcp and FI_TCP_IFACE=eth0, "
            "gloo GLOO_SOCKET_IFNAME=eth0 (see launch.environment)"
        )
