"""Calls averagers before the first optimizer step after an averaging, so that they can check the model."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

_listeners: dict[int, weakref.WeakSet[Any]] = {}  # by id of the tensor
_waiting: weakref.WeakKeyDictionary[Any, weakref.WeakMethod[Callable[[], None]]] = weakref.WeakKeyDictionary()
_hook: Any = None


def watch(tensors: Sequence[Tensor], listener: object) -> None:
    """Registers the tensors of ``listener``, before whose optimizer steps :func:`call_before_step` calls it.

    The listener is held weakly. It must hold the tensors, so that no other object gets their ids.
    """
    global _hook
    if _hook is None:
        _hook = register_optimizer_step_pre_hook(_before_step)
    ids = [id(tensor) for tensor in tensors]
    for key in ids:
        _listeners.setdefault(key, weakref.WeakSet()).add(listener)
    weakref.finalize(listener, _forget, ids)


def call_before_step(listener: object, call: Callable[[], None]) -> None:
    """Has ``call``, a method of the listener, called once: before an optimizer of one of its tensors steps.

    It returns at once.
    """
    _waiting[listener] = weakref.WeakMethod(call)


def _forget(ids: list[int]) -> None:
    for key in ids:
        if not _listeners.get(key):
            _listeners.pop(key, None)


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if not _waiting:  # the usual case: only the first step after an averaging has a listener
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for listener in tuple(_listeners.get(id(parameter), ())):
                method = _waiting.pop(listener, None)
                call = None if method is None else method()
                if call is not None:
                    call()
