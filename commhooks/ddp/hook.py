"""``sparse_hook``, the DDP communication hook, and ``register``, which registers it on a model."""

# No `from __future__ import annotations` here: register_comm_hook inspects the hook's real annotations.
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future

from ..gradient.bucket import GRAD_DTYPES
from .optimizers import check_optimizer
from .state import SparseState
from .wrapped import check_group, plain_name, require_ddp


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

        if bucket.index() == 0:  # a step's first
            check_group(state.process_group, state.reducer.connection)
        averaged: Future[torch.Tensor] = allreduce_hook(state.process_group, bucket)
        return averaged
    return state.submit(bucket.buffer(), bucket.index(), tuple(bucket.parameters()), bucket.is_last())


def register(model: Any, state: SparseState, optimizer: torch.optim.Optimizer | None = None) -> SparseState:
    """Registers ``sparse_hook`` on a DDP model. A collective call.

    It also tells the state the parameters' names and opens its transport. A copy of the model (``deepcopy``,
    ``AveragedModel``, ``torch.save``) takes a copy of the state along. DDP forgets the hook of a copy, so the
    copy's first forward pass with gradients registers it again.

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
    for key, guard in list(ddp._forward_pre_hooks.items()):
        if isinstance(guard, _Guard):  # of a copied model, which now gets another state
            del ddp._forward_pre_hooks[key]
            _forget_pair(ddp, guard.state)
    _bind(ddp, state)
    state.open(next(ddp.parameters()).device.type)
    _add_hook(ddp, state)
    ddp.register_forward_pre_hook(_Guard(state, ddp))
    return state


class _Guard:
    """The forward pre-hook of a registered model. It raises the state's error with the error's own type.

    Out of backward every error comes as ``RuntimeError``. In a copy of the model it registers the hook again.

    Args:
        state: the model's.
        model: held weakly, and not copied.
    """

    def __init__(self, state: SparseState, model: Any) -> None:
        self.state = state
        self._model: Callable[[], Any] = weakref.ref(model)

    def __call__(self, module: Any, arguments: Any) -> None:
        if self._model() is not module and torch.is_grad_enabled():  # else it is only evaluated
            _forget_pair(module, self.state)
            _bind(module, self.state)
            _add_hook(module, self.state)
            self._model = weakref.ref(module)
        self.state.raise_error()

    def __getstate__(self) -> dict[str, Any]:
        return {"state": self.state}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        self.state, self._model = saved["state"], _no_model


def _no_model() -> None:
    """Stands for a reference whose model is gone."""


def _forget_pair(ddp: Any, state: SparseState) -> None:
    """Removes the hook from a copied model's list. The copy's reducer does not have it."""
    ddp._comm_hooks = [pair for pair in ddp._comm_hooks if pair[1] is not state]


def _bind(ddp: Any, state: SparseState) -> None:
    """Gives the state its model, the parameters' names and the process group."""
    state.attach(ddp)
    state.set_names((plain_name(name), p) for name, p in ddp.module.named_parameters())
    state.process_group = ddp.process_group


def _add_hook(ddp: Any, state: SparseState) -> None:
    if not state.ddp_allreduce:  # without any hook DDP averages in C++
        ddp.register_comm_hook(state, sparse_hook)


def _check_dtypes(ddp: Any) -> None:
    """Raises ``TypeError`` with the name of a parameter whose gradient the hook could not take."""
    for name, p in ddp.module.named_parameters():
        if p.requires_grad and p.dtype not in GRAD_DTYPES and name not in ddp.parameters_to_ignore:
            raise TypeError(
                f"{plain_name(name)} is {p.dtype}: gradients must be float32, bfloat16 or float16. Use "
                "model.float(), or train this model without a sparse hook"
            )
