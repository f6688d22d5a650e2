"""Mixed precision with a GradScaler, and gradient clipping, beside sparse gradients.

    torchrun --nproc-per-node 2 examples/amp_clipping.py

The state gets the scaler, so the memory is in unscaled units. The clip stands before the memory: what
`clip_grad_norm_` cuts off the average after backward would be lost.
"""

import math
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commhooks
from commhooks import AllGather, ErrorFeedback, SparseState, TopK

CLIP = 1.0  # what training without compression would give to clip_grad_norm_


def main():
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    dist.init_process_group("nccl" if cuda else "gloo")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 1)).to(device)
    model = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**20)  # too large: the first steps are skipped
    # The noise of one rank's gradient is that much larger. With B buckets: CLIP * sqrt(P / B).
    clip_norm = CLIP * math.sqrt(dist.get_world_size())
    memory = ErrorFeedback(momentum=0.9, factor_masking=True, clip_norm=clip_norm)
    state = SparseState(TopK(0.05), AllGather(), memory, grad_scaler=scaler)
    commhooks.register(model, state, optimizer)

    weights = torch.linspace(-0.3, 0.3, 32)
    torch.manual_seed(dist.get_rank())  # each rank draws its own data
    for _ in range(400):
        x = torch.randn(64, 32)
        x, y = x.to(device), (x @ weights)[:, None].to(device)
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=torch.float16):
            loss = nn.functional.mse_loss(model(x).float(), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    if dist.get_rank() == 0:
        print(f"loss {loss.item():.3f}, scale 2^{math.log2(scaler.get_scale()):.0f}")
        print(f"{state.stats()['nonfinite_steps']} steps skipped")
    state.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
