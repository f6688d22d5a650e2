"""Data-parallel training in which every rank sends a hundredth of its gradient.

    torchrun --nproc-per-node 2 examples/ddp.py

The lines that name commhooks are all that differs from plain DistributedDataParallel. Momentum is in the
memory, so the optimizer has none. `SparseState.for_optimizer` (examples/first.py) makes these parts in one call.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commhooks
from commhooks import AllGather, ErrorFeedback, ExponentialWarmup, SparseState, TopK

STEPS = 400


def batches(rank):
    """Inputs (64, 32) and targets (64, 1) of this rank: a fixed function to be learnt."""
    weights = torch.linspace(-0.3, 0.3, 32)
    generator = torch.Generator().manual_seed(rank)
    while True:
        x = torch.randn(64, 32, generator=generator)
        yield x, (x @ weights)[:, None]


def main():
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005)

    density = ExponentialWarmup(0.01, warmup_steps=STEPS // 4)  # the first steps send more
    state = SparseState(TopK(density), AllGather(), ErrorFeedback(momentum=0.9))
    commhooks.register(model, state, optimizer)

    for step, (x, y) in zip(range(STEPS), batches(rank)):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        if rank == 0 and step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)

    stats = state.stats()
    if rank == 0:
        print(f"step {STEPS}: loss {loss.item():.3f}")
        print(f"bytes a step: {stats['bytes_sent']:,} sent, {stats['dense_bytes']:,} in the gradient")
    state.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
