"""Joining the ranks of a job that torchrun or mpiexec started, and leaving it without hanging.

Under mpiexec the process group is gloo over a TCP store that rank 0 opens; MPI only carries its address. MPI is imported
inside functions: DataLoader workers re-import the main module and must not start it.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from commhooks.transports.mpi import wait_until_read
from commhooks.transports.own_group import leave as leave  # the last thing a job does

# What launchers of MPI jobs tell a rank about the number of ranks: MPICH (and Intel), Open MPI.
MPI_SIZE_VARIABLES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE")


@dataclass(frozen=True)
class World:
    """This rank's place; `launcher` is "torchrun", "mpi" or "single"."""

    rank: int
    size: int
    launcher: str
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """The mean over ranks of a CPU tensor, by the process group (not counted as the scheme's traffic)."""
        return self.sum(values) / self.size

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks of a CPU tensor."""
        values = values.clone()
        dist.all_reduce(values)
        return values

    def max(self, values: Tensor) -> Tensor:
        """The maximum over ranks of a CPU tensor."""
        values = values.clone()
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values


def launcher() -> str:
    """Who started this process, by its environment."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ:
        return "torchrun"
    if any(name in os.environ for name in MPI_SIZE_VARIABLES):
        return "mpi"
    return "single"


@contextmanager
def session(device: str = "cpu", timeout_s: float = 120.0) -> Iterator[World]:
    """The default process group for the time of the block.

    An error in the block ends the process at once and with it the job: through `MPI_Abort` under MPI, since
    `MPI_Finalize` would wait for ranks that wait for this one.

    Args:
        device: "cpu", or "cuda" for one GPU a rank and NCCL beside gloo.
        timeout_s: after how many seconds a collective of the process group fails.
    """
    kind = launcher()
    try:
        yield _join(kind, device, timedelta(seconds=timeout_s))
    except BaseException as error:
        _leave_in_error(kind, error)
    dist.barrier()
    dist.destroy_process_group()


def _join(kind: str, device: str, timeout: timedelta) -> World:
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    if kind == "torchrun":
        rank, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        place = _device(device, local)
        dist.init_process_group(backend, timeout=timeout)
    elif kind == "mpi":
        comm = _world_comm()
        rank, size = comm.Get_rank(), comm.Get_size()
        place = _device(device, _local_rank(comm))
        dist.init_process_group(
            backend, store=_store(comm, timeout), rank=rank, world_size=size, timeout=timeout
        )
    else:
        rank, size = 0, 1
        place = _device(device, 0)
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return World(rank, size, kind, place)


def _device(device: str, local_rank: int) -> torch.device:
    if device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(
            f"device must be one that this machine has, got {device!r}: torch sees no CUDA device"
        )
    place = torch.device(device, local_rank % torch.cuda.device_count())
    torch.cuda.set_device(place)
    return place


def _world_comm() -> Any:
    """COMM_WORLD, after checking that the launcher and the library are of one MPI.

    Raises:
        RuntimeError: the launcher started more ranks than this MPI library sees (each would train alone).
    """
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    told = [int(os.environ[name]) for name in MPI_SIZE_VARIABLES if name in os.environ]
    if told and told[0] != comm.Get_size():
        library = MPI.Get_library_version().splitlines()[0].strip("\0 ")
        raise RuntimeError(
            f"the launcher started {told[0]} ranks, but {library} sees {comm.Get_size()}: the mpiexec of another MPI. "
            f"Use the one beside this Python: {os.path.join(os.path.dirname(sys.executable), 'mpiexec')}"
        )
    return comm


def _local_rank(comm: Any) -> int:
    names = comm.allgather(socket.gethostname())
    return int(names[: comm.Get_rank()].count(names[comm.Get_rank()]))


def _store(comm: Any, timeout: timedelta) -> dist.Store:
    """A TCP store opened by rank 0 on a free port, whose address goes round by MPI."""
    rank, size = comm.Get_rank(), comm.Get_size()
    names = comm.allgather(socket.gethostname())
    one_host = len(set(names)) == 1
    store, address = None, None
    if rank == 0:
        host = "127.0.0.1" if one_host else os.environ.get("MASTER_ADDR") or socket.getfqdn()
        store = dist.TCPStore(host, 0, size, True, timeout=timeout, wait_for_workers=False)
        address = (host, store.port)
    host, port = comm.bcast(address)
    return store or dist.TCPStore(host, port, size, False, timeout=timeout)


def _leave_in_error(kind: str, error: BaseException) -> None:
    """Ends the process with a non-zero status, past every destructor that could wait for another rank."""
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        code = error.code
    else:
        traceback.print_exception(error)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if kind == "mpi" and code != 0:
        from mpi4py import MPI

        wait_until_read(sys.stderr)  # mpiexec ends the ranks without reading what is left in their pipes
        MPI.COMM_WORLD.Abort(code)
    os._exit(code)
