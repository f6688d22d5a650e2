"""The bucket layout that a freshly wrapped model would have in the middle of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from .state import SparseState


def prime_layout(model: DistributedDataParallel, state: SparseState, step: Callable[[], Any]) -> None:
    """Brings a freshly wrapped model to the bucket layout it would have in the middle of a run.

    DDP lays its buckets anew after the first backward, so a resumed run would select per other buckets than
    the run it continues. Call this after wrapping, before the model's and the state's checkpoints are loaded.

    Args:
        model: the wrapped model with ``state``'s hook.
        state: its state; its memory is not touched, nothing is sent by it.
        step: one forward and backward on any batch of the usual shape, without an optimizer step. It is
            called twice; buffers (batch-norm statistics) and gradients are put back, random generators too.
    """
    buffers = {name: b.detach().clone() for name, b in model.module.named_buffers()}
    cuda = [p.device for p in model.parameters() if p.device.type == "cuda"][:1]
    with state.passthrough(), torch.random.fork_rng(devices=cuda):
        for _ in range(2):
            step()
            model.zero_grad(set_to_none=True)
    for name, buffer in model.module.named_buffers():
        buffer.copy_(buffers[name])
