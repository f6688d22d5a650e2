"""``prime_layout``: makes a resumed run select per the same buckets as the run that it continues."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
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
            called twice. Afterwards, also after an error, the model's buffers (batch-norm statistics) and the
            random generators of torch (on all GPUs), numpy and Python are as before, and gradients are None.

    Raises:
        RuntimeError: ``step`` ran and ``state`` saw no bucket: it is not registered on ``model``, or ``step``
            runs no backward, or inside ``no_sync()``.
    """
    with state.passthrough(), _same_generators(), _same_buffers(model.module):
        for _ in range(2):
            try:
                step()
            finally:
                model.zero_grad(set_to_none=True)
        if not state.passed and not state.ddp_allreduce:  # where DDP averages there is no hook
            raise RuntimeError(
                "prime_layout: step ran, and no bucket came to the state. Call commhooks.register(model, "
                "state) first, and let step run forward and backward of this model outside no_sync()"
            )


@contextmanager
def _same_buffers(module: nn.Module) -> Iterator[None]:
    """Puts the module's buffers back at the end of the block."""
    before = {name: b.detach().clone() for name, b in module.named_buffers()}
    try:
        yield
    finally:
        for name, buffer in module.named_buffers():
            if name in before:
                buffer.detach().copy_(before[name])


@contextmanager
def _same_generators() -> Iterator[None]:
    """Puts all random generators of the process back at the end of the block."""
    of_python = random.getstate()
    numpy = sys.modules.get("numpy")
    of_numpy = numpy.random.get_state() if numpy is not None else None
    cuda = range(torch.cuda.device_count()) if _uses_cuda() else ()
    try:
        with torch.random.fork_rng(devices=cuda):
            yield
    finally:
        random.setstate(of_python)
        if numpy is not None:
            numpy.random.set_state(of_numpy)


def _uses_cuda() -> bool:
    started: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return started
