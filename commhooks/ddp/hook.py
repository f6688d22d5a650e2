"""The DDP communication hook."""

# No `from __future__ import annotations` here: register_comm_hook inspects the hook's real annotations.
from typing import Any

import torch
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from .state import SparseState, warn_of_double_momentum


def sparse_hook(state: SparseState, bucket: GradBucket, *unsupported: Any) -> Future[torch.Tensor]:
    """Replaces a bucket's gradient by the sparse average over ranks; for ``register_comm_hook``.

    Returns at once: selection and communication run on the state's own thread, bucket by bucket in DDP's
    order, while backward goes on.

    Args:
        state: the model's ``SparseState``.
        bucket: DDP's bucket; its buffer is overwritten.
        unsupported: what FSDP passes beside; anything here is a ``TypeError``.

    Raises:
        TypeError: not a DDP bucket (compiled DDP and FSDP pass other things), or a gradient that is not dense
            float32, bfloat16 or float16.
    """
    if not isinstance(state, SparseState):
        raise TypeError(f"state must be a SparseState, got {type(state).__name__}")
    if unsupported or not isinstance(bucket, GradBucket):
        raise TypeError(
            f"bucket must be DDP's GradBucket, got {type(bucket).__name__}: supported is eager "
            "DistributedDataParallel. Compiled DDP passes (grad, param) tuples (set "
            "torch._dynamo.config.optimize_ddp = 'ddp_optimizer' or compile the module inside DDP instead); "
            "FSDP shards gradients before its hooks and is not supported"
        )
    if _left_to_ddp(state):
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        averaged: Future[torch.Tensor] = allreduce_hook(state.process_group, bucket)
        return averaged
    return state.submit(bucket.buffer(), bucket.index(), tuple(bucket.parameters()), bucket.is_last())


def _left_to_ddp(state: SparseState) -> bool:
    """Whether ``SparseState.auto`` decided not to compress: then DDP's own all-reduce is faster than ours by a thread.

    NaN and Inf stay in the sum there, so only the policy "propagate" can be left to it; ``stats`` counts nothing.
    """
    plain = state.plan is not None and not state.reducer.remembers and state.reducer.nonfinite == "propagate"
    return plain and state.reducer.connection.requested == "distributed" and not state._passthrough


def register(
    model: DistributedDataParallel, state: SparseState, optimizer: torch.optim.Optimizer | None = None
) -> SparseState:
    """Registers ``sparse_hook`` on a DDP model and hands the parameters' names to the state. A collective
    call.

    Args:
        model: the wrapped model.
        state: a state of its own.
        optimizer: looked at only to warn of a second momentum.

    Returns:
        ``state``.

    Raises:
        TypeError: ``model`` is not DDP's wrapper.
        ValueError: the state belongs to another model, or its transport connects other ranks than DDP's
            group.
    """
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(f"model must be a DistributedDataParallel, got {type(model).__name__}")
    if not isinstance(state, SparseState):
        raise TypeError(f"state must be a SparseState, got {type(state).__name__}")
    state.attach(model)
    memory = state.reducer.memory
    warn_of_double_momentum(memory, optimizer or getattr(memory, "optimizer", None))
    state.set_names(model.module.named_parameters())
    state.process_group = model.process_group
    state.open(next(model.parameters()).device.type)
    if not _left_to_ddp(state):  # without any hook DDP averages in C++
        model.register_comm_hook(state, sparse_hook)
    # Out of backward an error reaches the user as RuntimeError; the next forward raises it with its own type.
    model.register_forward_pre_hook(lambda module, arguments: state.raise_error())
    return state
