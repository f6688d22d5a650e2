"""The smallest whole script: a hundredth of the gradient is sent.

torchrun --nproc-per-node 2 examples/first.py
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commhooks

dist.init_process_group("gloo")
torch.manual_seed(0)
model = DistributedDataParallel(nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 1)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
# SGD's momentum becomes 0 and acts inside the hook instead, before values are selected.
state = commhooks.SparseState.for_optimizer(optimizer, density=0.01, warmup_steps=0)
commhooks.register(model, state, optimizer)
torch.manual_seed(dist.get_rank())  # each rank draws its own data
for step in range(400):
    x = torch.randn(64, 32)
    optimizer.zero_grad()
    loss = nn.functional.mse_loss(model(x), 0.3 * x.sum(1, keepdim=True))
    loss.backward()
    optimizer.step()
print(f"rank {dist.get_rank()}: loss {loss.item():.3f}, {state.stats()['bytes_sent']:,} bytes sent a step")
dist.destroy_process_group()
