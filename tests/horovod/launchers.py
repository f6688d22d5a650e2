"""Horovod's ways to start a job, as test helpers on top of launch.run."""

import os
import sys
from pathlib import Path

from launch import run

HERE = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent
LAUNCHERS = {
    "gloo": lambda n: [str(BIN / "horovodrun"), "-np", str(n), "--gloo", sys.executable],
    "horovodrun-mpi": lambda n: [str(BIN / "horovodrun"), "-np", str(n), "--mpi", sys.executable],
    "mpi": lambda n: [str(BIN / "mpirun"), "-np", str(n), sys.executable, "-m", "mpi4py"],
    "bare-mpi": lambda n: [str(BIN / "mpirun"), "-np", str(n), sys.executable],
}


def horovod_job(launcher, n, script, *args, timeout=120.0, env=None, check=True):
    """Runs a script on n ranks under a launcher of LAUNCHERS; see launch.run."""
    path = os.pathsep.join([str(BIN), os.environ.get("PATH", "")])  # horovodrun finds mpirun there
    settings = {"PATH": path, "COMMHOOKS_TEST_RANKS": str(n), **(env or {})}
    return run([*LAUNCHERS[launcher](n), str(script), *map(str, args)], timeout=timeout, env=settings, check=check)
