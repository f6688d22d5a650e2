"""``prime_layout``: makes a resumed run select per the same buckets as the run that it continues."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from .state import SparseState


def prime_layout(model: DistributedDataParallel, state: SparseState, step: Callable[[], Any]) -> None:
    """Brings a freshly wrapped model to the bucket layout that it would have in the middle of a run.

    DDP changes its bucket layout after the first backward. So in its first step a resumed run would select
    per other buckets than the run that it continues. Call this after wrapping, before the model's and the
    state's checkpoints are loaded.

    Args:
        model: the wrapped model, on which ``state``'s hook is registered.
        state: the model's state. It sends nothing and its memory does not change.
        step: runs one forward and backward on any batch of the usual shape, without an optimizer step. It is
            called twice. Afterwards the model's buffers (batch-norm statistics) and torch's random generators
            are as before, and gradients are None.
    """
    buffers = {name: b.detach().clone() for name, b in model.module.named_buffers()}
    cuda = [p.device for p in model.parameters() if p.device.type == "cuda"][:1]
    with state.passthrough(), torch.random.fork_rng(devices=cuda):
        for _ in range(2):
            step()
            model.zero_grad(set_to_none=True)
    for name, buffer in model.module.named_buffers():
        buffer.copy_(buffers[name])
