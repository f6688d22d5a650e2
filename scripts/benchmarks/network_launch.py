"""Starts one rank on every host of a `namespaces.Network` and joins them by MPI and gloo."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Sequence

from benchmarks.namespaces import Network

ROOT = Path(__file__).resolve().parents[2]
_LAUNCHER_PREFIXES = ("OMPI_", "PMIX_", "PRTE_", "PMI_", "HYDI_", "HYDRA_", "TORCHELASTIC_")


class JobError(RuntimeError):
    """The ranks ended badly or ran past their time; the message holds the end of their output."""


def run_ranks(network: Network, program: Sequence[str], *, timeout_s: float, show: bool = False) -> str:
    """Runs `python -m mpi4py PROGRAM` with rank r on host r; returns what they printed.

    Args:
        network: an entered network; one rank per host.
        program: path and arguments, or `-m` and a module of `scripts/`.
        timeout_s: for the whole job; then it is killed.
        show: let the ranks write to the terminal instead of returning their output.

    Raises:
        JobError: exit status not 0, or out of time.
    """
    mpiexec = Path(sys.executable).with_name("mpiexec")
    if not mpiexec.exists():
        raise JobError(f"there is no mpiexec beside {sys.executable}: pip install mpich mpi4py")
    with tempfile.TemporaryDirectory(prefix="commhooks-ranks-") as folder:
        wrapper = Path(folder) / "on_host"
        wrapper.write_text(f'#!/bin/sh\nexec ip netns exec {network.host_prefix}$PMI_RANK "$@"\n')
        wrapper.chmod(0o755)
        command = [
            str(mpiexec),
            "-n",
            str(network.hosts),
            str(wrapper),
            sys.executable,
            "-m",
            "mpi4py",
            *program,
        ]
        return _run(command, timeout_s, show)


def environment() -> dict[str, str]:
    """For ranks in namespaces: TCP on eth0 for both libraries, one thread a rank, no other launcher's traces."""
    env = {n: v for n, v in os.environ.items() if not n.startswith(_LAUNCHER_PREFIXES)}
    paths = [str(ROOT), str(ROOT / "scripts"), env.get("PYTHONPATH", "")]
    return env | {
        "OMP_NUM_THREADS": env.get("OMP_NUM_THREADS", "1"),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "GLOO_SOCKET_IFNAME": "eth0",
        # Without these MPICH finds its peers in shared memory and sends nothing over the network.
        "MPIR_CVAR_NOLOCAL": "1",
        "MPIR_CVAR_CH4_NETMOD": "ofi",
        "FI_PROVIDER": "tcp",
        "FI_TCP_IFACE": "eth0",
    }


class NotCrossedError(RuntimeError):
    """Ranks found each other by another way than the network whose limit was set."""


def check_crossed(counted_bytes: float, interface_bytes: float, what: str) -> None:
    """In a rank: all ranks' interfaces together must have sent what the transports counted. A collective call.

    Together, because the count of a library's own all-reduce is an average: some of its ranks may send less.

    Args:
        counted_bytes: what this rank's transport counted, 0 where nobody counts.
        interface_bytes: what this rank's interface sent in the same time.
        what: was measured, for the message.

    Raises:
        NotCrossedError: on all ranks, with more than one rank, if they sent less.
    """
    import torch
    import torch.distributed as dist

    sums = torch.tensor([counted_bytes, interface_bytes], dtype=torch.float64)
    dist.all_reduce(sums)
    counted, sent = sums.tolist()
    if dist.get_world_size() > 1 and sent < counted:
        raise NotCrossedError(
            f"{what}: the ranks counted {counted:.0f} bytes, their interfaces sent {sent:.0f}: the traffic did not cross "
            "the network. MPICH needs MPIR_CVAR_NOLOCAL=1, MPIR_CVAR_CH4_NETMOD=ofi, FI_PROVIDER=tcp and "
            "FI_TCP_IFACE=eth0, gloo GLOO_SOCKET_IFNAME=eth0 (see environment())"
        )


def join() -> tuple[int, int]:
    """In a rank: starts MPI and a gloo process group over the same ranks; returns (rank, world size)."""
    import mpi4py

    mpi4py.rc.thread_level = "multiple"
    import torch
    import torch.distributed as dist
    from mpi4py import MPI

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    comm = MPI.COMM_WORLD
    rank, size = comm.Get_rank(), comm.Get_size()
    host, store = "10.77.0.1", None
    if rank == 0:
        store = dist.TCPStore(host, 0, size, True, wait_for_workers=False)
    port = comm.bcast(store.port if store else None)
    if rank:
        store = dist.TCPStore(host, port, size, False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    return rank, size


def interface_bytes() -> int:
    """In a rank: bytes its host's interface has sent."""
    return int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text())


def _run(command: list[str], timeout_s: float, show: bool) -> str:
    pipe: Any = None if show else subprocess.PIPE
    process = subprocess.Popen(
        command,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=pipe,
        stderr=None if show else subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        _kill(process.pid)
        output, _ = process.communicate()
        raise JobError(f"the ranks ran past {timeout_s:g} s\n{(output or '')[-2000:]}") from None
    finally:
        _kill(process.pid)
    if process.returncode:
        raise JobError(f"the ranks ended with status {process.returncode}\n{(output or '')[-4000:]}")
    return output or ""


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
