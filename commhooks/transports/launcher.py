"""Reads from the environment which launcher started this process, its rank and the number of ranks."""

from __future__ import annotations

import os
from typing import NamedTuple


class Launched(NamedTuple):
    """The launcher of this process, and the process's place in the job.

    Attributes:
        launcher: name of the launcher, for messages.
        rank: this process's rank.
        world_size: number of processes that the launcher started.
    """

    launcher: str
    rank: int
    world_size: int


_VARIABLES = (
    ("torchrun", "RANK", "WORLD_SIZE"),
    ("horovodrun", "HOROVOD_RANK", "HOROVOD_SIZE"),
    ("Open MPI's mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("mpiexec", "PMI_RANK", "PMI_SIZE"),
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)
"""Launcher, variable of the rank, variable of the number of ranks. The innermost launcher is first.

Launchers nest: srun may start mpiexec, and either may start torchrun. ``SLURM_NTASKS`` is not read. It
belongs to the allocation, so that a single process of a batch script sees it too.
"""
SIZE_VARIABLES = {launcher: size for launcher, _, size in _VARIABLES}
"""By launcher, the variable of the number of ranks."""


def launched() -> Launched | None:
    """Returns the innermost launcher, this process's rank and the number of ranks. None: none is known.

    A pair of variables is ignored when one of them is missing or not a number.
    """
    for launcher, rank, size in _VARIABLES:
        found = os.environ.get(rank, ""), os.environ.get(size, "")
        if all(text.isdecimal() for text in found):
            return Launched(launcher, int(found[0]), int(found[1]))
    return None


_LOCAL_RANKS = (
    "LOCAL_RANK",
    "HOROVOD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MPI_LOCALRANKID",
    "SLURM_LOCALID",
)


def local_rank() -> int:
    """Returns this process's rank on its machine, as the innermost launcher that tells it does. Else 0."""
    return next((int(text) for n in _LOCAL_RANKS if (text := os.environ.get(n, "")).isdecimal()), 0)
