"""Is it faster on your network? Times a step of plain DDP, of torch's fp16 hook and of ours, on the ranks it runs on.

    torchrun --nproc-per-node 2 examples/measure.py 50      # steps of each; on two hosts see docs/tutorial.md

Put your own model, batch and loss in place of these.
"""

import statistics
import sys
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

import commhooks
from commhooks import SparseState

MODEL, BATCH = [nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)], 16
OURS = {"top-k 0.01": SparseState.topk, "gTop-k 0.01": SparseState.gtopk}


def measure(model, exchange, steps):
    """Median over the steps of the slowest rank's milliseconds; without `exchange` gradients stay on their rank."""
    seconds = torch.zeros(steps + 3)
    x, y = torch.randn(BATCH, 1024), torch.randint(10, (BATCH,))
    for step in range(steps + 3):  # three to warm up
        dist.barrier()
        begun = time.perf_counter()
        model.zero_grad()
        if exchange:
            nn.functional.cross_entropy(model(x), y).backward()
        else:
            with model.no_sync():
                nn.functional.cross_entropy(model(x), y).backward()
        seconds[step] = time.perf_counter() - begun
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return 1000 * statistics.median(seconds[3:].tolist())


def main(steps):
    dist.init_process_group("gloo")
    for name in ["no communication", "dense (DDP)", "fp16 hook", *OURS]:
        model, state = DistributedDataParallel(nn.Sequential(*MODEL)), None
        if name == "fp16 hook":
            model.register_comm_hook(None, fp16_compress_hook)
        if name in OURS:
            state = commhooks.register(model, OURS[name](0.01))
        ms = measure(model, name != "no communication", steps)
        sent = f", {state.stats()['bytes_sent']:,} bytes sent by a rank" if state else ""
        if dist.get_rank() == 0:
            print(f"{name}: {ms:.1f} ms a step{sent}", flush=True)
    dist.destroy_process_group()


main(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
