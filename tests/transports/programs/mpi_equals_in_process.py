"""Every scheme at P = 1, 2, 3, 4, 5, 8 on sub-communicators of one job, compared bit for bit with in_process."""

import sys

import torch
from mpi4py import MPI
from twins import assert_equals_in_process

from commhooks.transports.mpi import MpiTransport

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
