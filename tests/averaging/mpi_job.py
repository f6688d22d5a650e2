"""Run under mpiexec by test_averaging_transports.py: every averager over the MPI transport against its
oracle.

`mpi_job.py steps` checks trajectories and counted bytes; `mpi_job.py stall|die local|decentralized` lets one
rank stay away, or killed, at the second step.
"""

import os
import signal
import sys
import time

import torch

from averaging.scenarios import check_all
from averaging.workers import pair_averager


def main():
    torch.set_num_threads(1)
    from commhooks.transports import make

    if sys.argv[1] == "steps":
        transport = make("mpi", timeout_s=30.0)
        check_all(transport)
        print(f"rank {transport.rank} of {transport.world_size} is well", flush=True)
        transport.close()
        return
    mode, kind = sys.argv[1:]
    parameter = torch.nn.Parameter(torch.zeros(4))
    averager = pair_averager(kind, parameter, transport="mpi", timeout_s=3.0)
    averager.average_parameters([parameter])
    print(f"rank {averager.rank} has averaged", flush=True)
    if averager.rank == 1 and mode == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if averager.rank == 1:
        time.sleep(120)
    averager.average_parameters([parameter])


if __name__ == "__main__":
    main()
