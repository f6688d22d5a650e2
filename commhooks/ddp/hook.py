"""``sparse_hook``, the DDP communication hook, and ``register``, which registers it on a model."""

# No `from __future__ import annotations` here: register_comm_hook inspects the hook's real annotations.
from typing import Any

import torch
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future

from ..gradient.bucket import GRAD_DTYPES
from .optimizers import check_optimizer
from .state import SparseState
from .wrapped import plain_name, require_ddp


def sparse_hook(state: SparseState, bucket: GradBucket, *unsupported: Any) -> Future[torch.Tensor]:
    """Replaces a bucket's gradient by the sparse average over ranks. For ``register_comm_hook``.

    Returns at once: selection and communication run on the state's own thread, bucket by bucket in DDP's
    order, while backward goes on.

    Args:
        state: the model's ``SparseState``.
        bucket: DDP's bucket. Its buffer is overwritten.
        unsupported: catches the further arguments that FSDP passes. Any of them is a ``TypeError``.

    Returns:
        A future of the buffer. An error of the exchange is raised where DDP uses the future's value, also the
        ``TypeError`` for a gradient that is not dense float32, bfloat16 or float16.

    Raises:
        TypeError: ``bucket`` is not a DDP bucket (compiled DDP and FSDP pass other things), or ``state`` is
            not a ``SparseState``.
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
    if state.left_to_ddp:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        averaged: Future[torch.Tensor] = allreduce_hook(state.process_group, bucket)
        return averaged
    return state.submit(bucket.buffer(), bucket.index(), tuple(bucket.parameters()), bucket.is_last())


def register(model: Any, state: SparseState, optimizer: torch.optim.Optimizer | None = None) -> SparseState:
    """Registers ``sparse_hook`` on a DDP model. A collective call.

    It also tells the state the parameters' names and opens its transport.

    Args:
        model: the DDP model, or what Lightning Fabric's ``setup`` or ``torch.compile`` made of it.
        state: a state that serves no other model.
        optimizer: the job's optimizer. It is checked for combinations that do not train, and not kept.

    Returns:
        ``state``.

    Warns:
        UserWarning: momentum in two places, random-k with momentum, or L-BFGS.

    Raises:
        TypeError: there is no DDP model in ``model`` (the message says what to pass), ``state`` is not a
            ``SparseState``, or a parameter that trains is not float32, bfloat16 or float16.
        ValueError: the state belongs to another model, its transport connects other ranks than DDP's group,
            or its memory has momentum under an optimizer with a second moment (Adam and its like).
    """
    ddp = require_ddp(model)
    if not isinstance(state, SparseState):
        raise TypeError(f"state must be a SparseState, got {type(state).__name__}")
    if not state.ddp_allreduce:
        _check_dtypes(ddp)
    reducer = state.reducer
    optimizer = optimizer or getattr(reducer.memory, "optimizer", None)
    check_optimizer(reducer.memory, reducer.selector, optimizer, reducer.aggregator)
    state.attach(ddp)
    state.set_names((plain_name(name), p) for name, p in ddp.module.named_parameters())
    state.process_group = ddp.process_group
    state.open(next(ddp.parameters()).device.type)
    if not state.ddp_allreduce:  # without any hook DDP averages in C++
        ddp.register_comm_hook(state, sparse_hook)
    # Out of backward every error comes as RuntimeError. The next forward pass raises it with its own type.
    ddp.register_forward_pre_hook(lambda module, arguments: state.raise_error())
    return state


def _check_dtypes(ddp: Any) -> None:
    """Raises ``TypeError`` with the name of a parameter whose gradient the hook could not take."""
    for name, p in ddp.module.named_parameters():
        if p.requires_grad and p.dtype not in GRAD_DTYPES and name not in ddp.parameters_to_ignore:
            raise TypeError(
                f"{plain_name(name)} is {p.dtype}: gradients must be float32, bfloat16 or float16. Use "
                "model.float(), or train this model without a sparse hook"
            )
