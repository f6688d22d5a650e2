"""Tells listeners which parameters a torch optimizer has just stepped with."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook


class Listener(Protocol):
    """What :func:`listen` takes."""

    def stepped(self, ids: frozenset[int]) -> None:
        """Called after an optimizer's step with the ids of all parameters that the optimizer holds."""


_listeners: weakref.WeakSet[Any] = weakref.WeakSet()
_hooks: list[Any] = []  # one hook serves all listeners


def listen(listener: Listener) -> None:
    """Calls ``listener.stepped`` after every step of a torch optimizer. The listener is held weakly."""
    if not _hooks:
        _hooks.append(register_optimizer_step_post_hook(_after_step))
    _listeners.add(listener)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    ids = frozenset(id(p) for group in optimizer.param_groups for p in group["params"])
    for listener in list(_listeners):
        listener.stepped(ids)
