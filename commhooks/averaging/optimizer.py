"""An optimizer that steps locally and averages afterwards, also when a GradScaler skips the step."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.optim import PostLocalSGDOptimizer

from .averager import Averager


class AveragedOptimizer(PostLocalSGDOptimizer):
    """torch's ``PostLocalSGDOptimizer``, made safe for ``torch.amp.GradScaler``, with the averager's whole
    state.

    A scaler leaves out ``optimizer.step()`` on the rank whose gradients overflowed, and with torch's wrapper
    the averager's call with it: the ranks' step counts drift apart. This wrapper tells the scaler that it
    handles scaling itself, leaves out the *local* step only, and always counts. (In a plain loop with
    ``averager.average_parameters(...)`` after ``scaler.step(optimizer)`` there is no such trap.)

    Args:
        optim: the local optimizer.
        averager: any averager of commhooks.
    """

    _step_supports_amp_scaling = True  # GradScaler then calls step() always and sets grad_scale and found_inf

    def __init__(self, optim: torch.optim.Optimizer, averager: Averager) -> None:
        if not isinstance(averager, Averager):
            raise ValueError(f"averager must be a commhooks averager, got {averager!r}")
        super().__init__(optim, averager)
        self.averager: Averager = averager

    def step(self) -> None:  # type: ignore[override]
        """One local step (none if the scaler found Inf or NaN), then the averager's count and averaging."""
        found_inf = getattr(self, "found_inf", None)
        if found_inf is None or float(found_inf) == 0.0:
            scale = getattr(self, "grad_scale", None)
            if scale is not None:
                grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
                if grads:
                    torch._foreach_div_(grads, float(scale))
            self.optim.step()
        self.averager.average_parameters(self.param_groups)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state with ``"step"``, as torch's, and the averager's under ``"averager"``."""
        state = super().state_dict()  # type: ignore[no-untyped-call]
        return {**state, "averager": self.averager.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` returned."""
        inner = {key: value for key, value in state_dict.items() if key != "averager"}
        super().load_state_dict(inner)  # type: ignore[no-untyped-call]
        if "averager" in state_dict:
            self.averager.load_state_dict(state_dict["averager"])
