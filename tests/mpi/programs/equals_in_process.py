"""Every scheme at P = 1, 2, 3, 4, 5, 8 on sub-communicators of one job, compared bit for bit with in_process."""

import sys
from pathlib import Path

import torch
from mpi4py import MPI

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from twins import assert_equals_in_process  # noqa: E402

from commhooks.transports.mpi import MpiTransport  # noqa: E402

torch.set_num_threads(1)
world = MPI.COMM_WORLD
for size in (1, 2, 3, 4, 5, 8):
    comm = world.Split(0 if world.rank < size else MPI.UNDEFINED, world.rank)
    if comm == MPI.COMM_NULL:
        continue
    transport = MpiTransport(comm, timeout_s=60.0)
    assert (transport.rank, transport.world_size) == (world.rank, size)
    assert_equals_in_process(transport)
    transport.close()
    sys.stdout.write(f"equal P={size} rank={world.rank}\n")
    sys.stdout.flush()
