"""Starts the ranks of a measurement, one on every host of a test network, or all on loopback."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .namespaces import Network
from .records import ROOT, Record

RANK_PROGRAM = "benchmarks.harness.rank"
ADDRESS = "BENCH_ADDRESS"
"""Environment variable of the ranks: the IPv4 address at which rank 0 opens the process group's store."""
_LAUNCHER_PREFIXES = ("OMPI_", "PMIX_", "PRTE_", "PMI_", "HYDI_", "HYDRA_", "TORCHELASTIC_")


class JobError(RuntimeError):
    """The ranks ended badly or ran past their time; the message holds the end of their output."""


@dataclass(frozen=True)
class Loopback:
    """Ranks on this machine without namespaces: gloo over loopback, MPI as it finds its peers."""

    hosts: int


def run_job(
    network: Network | Loopback, measurement: str, cases: Sequence[dict[str, Any]], timeout_s: float
) -> tuple[list[Record], JobError | None]:
    """Runs `benchmarks.network.MEASUREMENT` on a list of cases.

    Returns:
        The records that came before the ranks failed, and how they failed (None: they did not).
    """
    with tempfile.TemporaryDirectory(prefix="commhooks-bench-") as folder:
        job, out = Path(folder) / "job.json", Path(folder) / "out.jsonl"
        job.write_text(json.dumps(list(cases)))
        error = None
        try:
            run_ranks(network, [measurement, str(job), str(out)], timeout_s=timeout_s)
        except JobError as caught:
            error = caught
        lines = out.read_text().splitlines() if out.exists() else []
    return [json.loads(line) for line in lines], error


def run_ranks(network: Network | Loopback, arguments: Sequence[str], *, timeout_s: float) -> str:
    """Runs the rank program with `arguments`, rank r on host r; returns what the ranks printed.

    Args:
        network: an entered network, or `Loopback`; one rank per host.
        arguments: of `benchmarks.harness.rank`.
        timeout_s: for the whole job; then it is killed.

    Raises:
        JobError: exit status not 0, or out of time.
    """
    mpiexec = Path(sys.executable).with_name("mpiexec")
    if not mpiexec.exists():
        raise JobError(f"there is no mpiexec beside {sys.executable}: pip install mpich mpi4py")
    with tempfile.TemporaryDirectory(prefix="commhooks-ranks-") as folder:
        command = [str(mpiexec), "-n", str(network.hosts)]
        if isinstance(network, Network):
            wrapper = Path(folder) / "on_host"
            wrapper.write_text(f'#!/bin/sh\nexec ip netns exec {network.host_prefix}$PMI_RANK "$@"\n')
            wrapper.chmod(0o755)
            command.append(str(wrapper))
        command += [sys.executable, "-m", "mpi4py", "-m", RANK_PROGRAM, *arguments]
        return _run(command, environment(network), timeout_s)


def module_path() -> dict[str, str]:
    """This process's environment, in which `python -m benchmarks...` finds its module."""
    paths = [str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def environment(network: Network | Loopback) -> dict[str, str]:
    """For ranks: both libraries on the network's interface, one thread a rank, no other launcher's traces."""
    env = {n: v for n, v in module_path().items() if not n.startswith(_LAUNCHER_PREFIXES)}
    env["OMP_NUM_THREADS"] = env.get("OMP_NUM_THREADS", "1")
    if isinstance(network, Loopback):
        return env | {"GLOO_SOCKET_IFNAME": "lo", ADDRESS: "127.0.0.1"}
    return env | {
        "GLOO_SOCKET_IFNAME": "eth0",
        ADDRESS: network.address(0),
        # Without these MPICH finds its peers in shared memory and sends nothing over the network.
        "MPIR_CVAR_NOLOCAL": "1",
        "MPIR_CVAR_CH4_NETMOD": "ofi",
        "FI_PROVIDER": "tcp",
        "FI_TCP_IFACE": "eth0",
    }


def _run(command: list[str], env: dict[str, str], timeout_s: float) -> str:
    process = subprocess.Popen(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
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
