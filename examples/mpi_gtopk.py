"""DistributedDataParallel under mpiexec: gloo for what DDP sends itself, gTop-k over MPI for the gradients.

    mpiexec -n 2 python -m mpi4py examples/mpi_gtopk.py

mpiexec sets none of the variables that `init_process_group` reads, so rank 0 opens a store and MPI carries its address.
Keep `-m mpi4py`: without it the error of one rank leaves the others waiting.
"""

import socket

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commhooks
from commhooks import ErrorFeedback, GTopK, SparseState, TopK


def init_process_group_beside_mpi(comm):
    """torch's default process group over gloo, with the ranks of `comm`."""
    names = comm.allgather(socket.gethostname())
    host = "127.0.0.1" if len(set(names)) == 1 else names[0]
    store = None
    if comm.rank == 0:
        store = dist.TCPStore(host, 0, comm.size, is_master=True, wait_for_workers=False)
    port = comm.bcast(store.port if store else None)
    store = store or dist.TCPStore(host, port, comm.size, is_master=False)
    dist.init_process_group("gloo", store=store, rank=comm.rank, world_size=comm.size)


def main():
    rank = MPI.COMM_WORLD.rank
    init_process_group_beside_mpi(MPI.COMM_WORLD)
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005)
    state = SparseState(TopK(0.01), GTopK(transport="mpi"), ErrorFeedback(momentum=0.9, factor_masking=True))
    commhooks.register(model, state, optimizer)

    weights = torch.linspace(-0.3, 0.3, 32)
    torch.manual_seed(rank)  # each rank draws its own data
    for step in range(401):
        x = torch.randn(64, 32)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), (x @ weights)[:, None])
        loss.backward()
        optimizer.step()
        if rank == 0 and step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    state.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
