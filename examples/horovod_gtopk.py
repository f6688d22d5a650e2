"""Horovod's optimizer with gTop-k: the fused gradients of all ranks become k values, the same on every rank.

    horovodrun -np 2 --gloo python examples/horovod_gtopk.py

Momentum is in the memory, so the optimizer inside has none. `scripts/install_horovod` builds Horovod for your torch.
"""

import horovod.torch as hvd
import torch
from torch import nn

from commhooks import ErrorFeedback, ExponentialWarmup, GTopK, SparseState, TopK
from commhooks.horovod import DistributedOptimizer

STEPS = 400


def main():
    hvd.init()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 1))
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)

    density = ExponentialWarmup(0.01, warmup_epochs=2, steps_per_epoch=20)  # the first 40 steps send more
    optimizer = DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.005),
        model.named_parameters(),
        state=SparseState(TopK(density), GTopK(), ErrorFeedback(momentum=0.9, factor_masking=True)),
    )

    weights = torch.linspace(-0.3, 0.3, 32)
    torch.manual_seed(hvd.rank())  # each rank draws its own data
    for step in range(STEPS):
        x = torch.randn(64, 32)
        y = (x @ weights)[:, None]
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        if hvd.rank() == 0 and step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)

    stats = optimizer.sparse_state.stats()
    if hvd.rank() == 0:
        print(f"step {STEPS}: loss {loss.item():.3f}")
        print(f"bytes a step: {stats['bytes_sent']:,} sent, {stats['dense_bytes']:,} in the gradient")
    optimizer.close()
    hvd.barrier()  # the first rank that leaves would shut Horovod down on all of them
    hvd.shutdown()


if __name__ == "__main__":
    main()
