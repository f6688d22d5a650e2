"""Run under mpiexec by test_averaging_transports.py: every averager over the MPI transport against its
oracle.

`mpi_job.py steps` checks trajectories and counted bytes; `mpi_job.py stall` lets one rank stay away.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from averaging.scenarios import check_all


def main():
    torch.set_num_threads(1)
    from commhooks.averaging import LocalSGD
    from commhooks.transports import make

    if sys.argv[1] == "steps":
        transport = make("mpi", timeout_s=30.0)
        check_all(transport)
        print(f"rank {transport.rank} of {transport.world_size} is well", flush=True)
        transport.close()
        return
    averager = LocalSGD(2, transport="mpi", timeout_s=5.0)
    parameter = torch.nn.Parameter(torch.zeros(4))
    for _ in range(2):
        if averager.rank == 1:
            time.sleep(120)
        averager.average_parameters([parameter])


if __name__ == "__main__":
    main()
