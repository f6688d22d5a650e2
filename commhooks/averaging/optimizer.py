"""An optimizer whose ``step()`` calls an averager too, also when a GradScaler skips the local step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.utils.hooks import RemovableHandle

from .averager import Averager, tell_parameters


class AveragedOptimizer(PostLocalSGDOptimizer):
    """Wraps a local optimizer and an averager into one optimizer: each ``step()`` counts and averages too.

    It is torch's ``PostLocalSGDOptimizer`` with support of schedulers, closures, hooks and ``GradScaler``.

    Its ``param_groups``, ``state`` and ``defaults`` are the local optimizer's own at all times, also after
    ``load_state_dict``, which gives an optimizer new groups. Hooks on steps see this optimizer. Hooks on
    state dicts are the local optimizer's.

    A scaler leaves out ``optimizer.step()`` on the rank whose gradients overflowed. With torch's wrapper that
    leaves out the averager's call too, and the ranks' step counts drift apart. This wrapper tells the scaler
    that it handles scaling itself. It leaves out the *local* step only, and always counts. (A plain loop that
    calls ``averager.average_parameters(...)`` after ``scaler.step(optimizer)`` has no such problem.)

    Args:
        optim: the local optimizer.
        averager: any averager of commhooks.

    Raises:
        ValueError: ``averager`` is not an averager of commhooks.
    """

    averager: Averager
    _step_supports_amp_scaling = True  # GradScaler then calls step() always and sets grad_scale and found_inf

    def __init__(self, optim: torch.optim.Optimizer, averager: Averager) -> None:
        # not super().__init__: it would keep the groups that the optimizer has now
        if not isinstance(averager, Averager):
            raise ValueError(f"averager must be a commhooks averager, got {averager!r}")
        tell_parameters(averager, optim.param_groups)
        self.__setstate__({"optim": optim, "averager": averager})

    def __getstate__(self) -> dict[str, Any]:
        return {"optim": self.optim, "averager": self.averager}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        super().__setstate__({})  # makes the hooks of an optimizer, and has step() call them

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The local optimizer's parameter groups."""
        return self.optim.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optim.param_groups = groups

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The local optimizer's defaults."""
        return self.optim.defaults

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The local optimizer's state."""
        return self.optim.state

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes a local step (none if the scaler found Inf or NaN), and calls the averager.

        Args:
            closure: for the local optimizer.

        Returns:
            What the local optimizer's step returned: the closure's loss.
        """
        loss = None
        found_inf = getattr(self, "found_inf", None)
        if found_inf is None or float(found_inf) == 0.0:
            scale = getattr(self, "grad_scale", None)
            if scale is not None:
                grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
                if grads:
                    torch._foreach_div_(grads, float(scale))
            loss = self.optim.step() if closure is None else self.optim.step(closure)
        self.averager.average_parameters(self.param_groups)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Returns the optimizer's state with ``"step"``, as torch's does, and with ``"averager"``."""
        return {
            **self.optim.state_dict(),
            "step": self.averager.step,
            "averager": self.averager.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` returned."""
        inner = {key: value for key, value in state_dict.items() if key != "averager"}
        super().load_state_dict(inner)  # type: ignore[no-untyped-call]
        if "averager" in state_dict:
            self.averager.load_state_dict(state_dict["averager"])

    def register_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        """Registers the hook on the local optimizer."""
        return self.optim.register_state_dict_pre_hook(hook, prepend)

    def register_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        """Registers the hook on the local optimizer."""
        return self.optim.register_state_dict_post_hook(hook, prepend)

    def register_load_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        """Registers the hook on the local optimizer."""
        return self.optim.register_load_state_dict_pre_hook(hook, prepend)

    def register_load_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        """Registers the hook on the local optimizer."""
        return self.optim.register_load_state_dict_post_hook(hook, prepend)

    def __repr__(self) -> str:
        return f"{self.optim!r} averaged by {self.averager!r}"
