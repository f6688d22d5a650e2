"""Local SGD: every rank trains alone and the models are averaged every 8 steps, with block momentum (M-AVG).

    torchrun --nproc-per-node 2 examples/local_sgd.py

The model is not wrapped in DistributedDataParallel. What travels is the model's change, and only its largest tenth;
the rest waits in the reducer's memory.
"""

import torch
import torch.distributed as dist
from torch import nn

from commhooks import AllGather, ErrorFeedback, Reducer, TopK
from commhooks.averaging import BlockMomentum

STEPS, PERIOD = 400, 8


def main():
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)  # all ranks start from the same model
    model = nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.5)

    averager = BlockMomentum(
        mu=0.5,
        period=PERIOD,
        params=model.parameters(),
        module=model,
        reducer=Reducer(TopK(0.1), AllGather(), ErrorFeedback()),
    )

    weights = torch.linspace(-0.3, 0.3, 32)
    torch.manual_seed(rank)  # each rank draws its own data
    for step in range(STEPS):
        x = torch.randn(64, 32)
        y = (x @ weights)[:, None]
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        averager.average_parameters(model.parameters())
        if rank == 0 and step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)

    if rank == 0:
        stats = averager.reducer.stats()
        print(f"step {STEPS}: loss {loss.item():.3f}")
        print(f"bytes an averaging: {stats['bytes_sent']:,} sent, {stats['dense_bytes']:,} in the model")
    averager.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
