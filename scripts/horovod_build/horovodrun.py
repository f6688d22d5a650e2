#!/usr/bin/env python3
# horovodrun as commhooks' scripts/install_horovod leaves it where MPI is an MPICH that calls itself HYDRA.
# Horovod 0.28 takes an MPI for MPICH by that word in `mpirun --version`. MPICH 5 no longer prints it there, and
# `horovodrun --mpi` fails with "does not find an installed MPI".
import sys

from horovod.runner import mpi_run
from horovod.runner.common.util import tiny_shell_exec
from horovod.runner.launch import run_commandline

stock = mpi_run._get_mpi_implementation


def implementation(env=None):
    answer = tiny_shell_exec.execute("mpirun --version", env)
    if answer is not None and answer[1] == 0 and "HYDRA" in answer[0]:
        return mpi_run._MPICH_IMPL
    return stock(env)


if __name__ == "__main__":  # Horovod starts helpers by spawn, which import this file
    mpi_run._get_mpi_implementation = implementation
    sys.exit(run_commandline())
