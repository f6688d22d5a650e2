"""What started this process, and which of how many ranks it is: read from the environment alone."""

from __future__ import annotations

import os
from typing import NamedTuple


class Launched(NamedTuple):
    """This process among those that one launcher started."""

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
"""From the launcher that is started last to the one that may have started it: srun may start mpiexec, and
either torchrun.

``SLURM_NTASKS`` is not read: it belongs to the allocation, so that a single process of a batch script sees it
too.
"""


def launched() -> Launched | None:
    """The launcher's name with this process's rank and the number of ranks; None where no launcher is known.

    A pair of variables of which one is missing or no number is passed over.
    """
    for launcher, rank, size in _VARIABLES:
        found = os.environ.get(rank, ""), os.environ.get(size, "")
        if all(text.isdecimal() for text in found):
            return Launched(launcher, int(found[0]), int(found[1]))
    return None
