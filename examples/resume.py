"""Save, resume, and go on with fewer ranks. Residuals differ between ranks, so each rank saves its own file.

torchrun --nproc-per-node 3 examples/resume.py runs/resume 40     # trains to step 40 and saves
torchrun --nproc-per-node 3 examples/resume.py runs/resume 80     # goes on, bit for bit
torchrun --nproc-per-node 2 examples/resume.py runs/resume 120    # goes on with fewer ranks
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commhooks


def main(folder, last):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    state = commhooks.SparseState.topk(0.05)
    commhooks.register(model, state, optimizer)

    def backward(step):
        x = torch.randn(64, 32, generator=torch.Generator().manual_seed(1000 * step + rank))
        loss = nn.functional.mse_loss(model(x), x.mean(1, keepdim=True))
        loss.backward()
        return loss.item()

    if saved := [torch.load(file) for file in sorted(folder.glob("newest/rank-*.pt"))]:
        commhooks.prime_layout(model, state, lambda: backward(0))  # the buckets of a run in progress
        model.module.load_state_dict(saved[0]["model"])
        optimizer.load_state_dict(saved[0]["optimizer"])
        state.load_state_dict([part["commhooks"] for part in saved])

    for step in range(saved[0]["done"] if saved else 0, last):
        optimizer.zero_grad()
        loss = backward(step)
        optimizer.step()
        if rank == 0:
            print(f"step {step}: loss {loss:.9f}", flush=True)

    (target := folder / f"step-{last}-ranks-{dist.get_world_size()}").mkdir(parents=True, exist_ok=True)
    mine = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "done": last}
    torch.save({**mine, "commhooks": state.state_dict()}, part := target / f"rank-{rank:04d}.part")
    part.replace(part.with_suffix(".pt"))  # a file of that name was whole until now
    dist.barrier()  # a checkpoint becomes the newest one when all ranks have written it
    if rank == 0:
        (folder / ".link").symlink_to(target.name)
        (folder / ".link").replace(folder / "newest")
    state.close()
    dist.destroy_process_group()


main(Path(sys.argv[1]), int(sys.argv[2]))
