"""Horovod's ways to start a job, as test helpers on top of launch.run."""

import os
import sys
from pathlib import Path

from launch import run

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BIN = Path(sys.executable).parent
LAUNCHERS = {  # program, its switch, what comes before the script
    "gloo": ("horovodrun", ["--gloo"], [sys.executable]),
    "horovodrun-mpi": ("horovodrun", ["--mpi"], [sys.executable]),
    "mpi": ("mpirun", [], [sys.executable, "-m", "mpi4py"]),
    "bare-mpi": ("mpirun", [], [sys.executable]),
}


def horovod_job(launcher, n, script, *args, timeout=150.0, env=None, check=True, options=()):
    """Runs a script on n ranks under a launcher of LAUNCHERS, with more options for it; see launch.run."""
    program, switch, python = LAUNCHERS[launcher]
    path = os.pathsep.join([str(BIN), os.environ.get("PATH", "")])  # horovodrun finds mpirun there
    settings = {"PATH": path, "COMMHOOKS_TEST_RANKS": str(n), **(env or {})}
    command = [str(BIN / program), "-np", str(n), *switch, *options, *python, str(script), *map(str, args)]
    return run(command, timeout=timeout, env=settings, check=check)
