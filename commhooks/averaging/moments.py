"""The state of a torch optimizer that is averaged with its parameters: momentum buffers, Adam's moments."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Choice = Literal["average", "mix", "leave"]


class Moments:
    """Which tensors of an optimizer's state go with a parameter.

    For ``torch.optim.SGD``, and for optimizers with its ``momentum`` and ``nesterov``, it is the
    ``momentum_buffer``. For any other it is all floating and complex tensors: Adam's ``exp_avg``,
    ``exp_avg_sq`` and ``step``. A parameter that had no gradient yet on this rank has no state. It gets one
    of zeros.

    Args:
        optimizer: the one that steps.
        choice: ``"average"`` or ``"mix"``, which mean the same here. ``"leave"``: no state goes with a
            parameter. None: as ``"average"``, for SGD only.

    Attributes:
        is_sgd: whether the optimizer has SGD's options. Then its only state is the momentum buffer.
        moves: whether state goes with a parameter.

    Raises:
        ValueError: another choice, None for an optimizer other than SGD, or ``dampening``, which torch leaves
            out of an SGD's first step, so that a zero buffer would not equal a missing one.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, choice: Choice | None) -> None:
        if choice not in (None, "average", "mix", "leave"):
            raise ValueError(f"moments must be 'average', 'mix' or 'leave', got {choice!r}")
        self.is_sgd = all("momentum" in g and "nesterov" in g for g in optimizer.param_groups)
        if choice is None and not self.is_sgd:
            raise ValueError(
                f"optimizer must have SGD's momentum (torch.optim.SGD), got {type(optimizer).__name__}: say "
                f"moments='average' to average its state too, or moments='leave' to leave it alone"
            )
        self.optimizer, self.moves = optimizer, choice != "leave"
        dampening = [group.get("dampening", 0.0) for group in optimizer.param_groups]
        if self.is_sgd and self.moves and any(dampening):
            raise ValueError(f"dampening must be 0, got {max(dampening)!r}")

    @property
    def options(self) -> list[str]:
        """The paper's option, ``"I"`` (Polyak) or ``"II"`` (Nesterov), for each of SGD's parameter groups."""
        return ["II" if group.get("nesterov", False) else "I" for group in self.optimizer.param_groups]

    def settings(self) -> dict[str, object]:
        """Returns the settings that must be the same on all ranks, by name."""
        if not (self.moves and self.is_sgd):
            moments = "averaged" if self.moves else "left alone"
            return {"optimizer": type(self.optimizer).__name__, "moments": moments}
        momenta = [group["momentum"] for group in self.optimizer.param_groups]
        return {"options": self.options, "momentum": momenta}

    def with_momentum(self, tensors: Sequence[Tensor]) -> list[bool]:
        """Whether each of the tensors has state that goes with it.

        Raises:
            ValueError: a tensor that requires a gradient is not the optimizer's.
        """
        group_of = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        result = []
        for tensor in tensors:
            group = group_of.get(id(tensor))
            if self.moves and group is None and tensor.requires_grad:
                raise ValueError(
                    f"params must belong to the optimizer, got a {tuple(tensor.shape)} that does not"
                )
            has_none = group is None or (self.is_sgd and group["momentum"] == 0.0)
            result.append(self.moves and not has_none)
        return result

    def of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Returns the state tensors of these, in order. The optimizer gets zeros for missing ones."""
        kept = [t for t, has in zip(tensors, self.with_momentum(tensors), strict=True) if has]
        return [value for tensor in kept for value in self._of(tensor)]

    def _of(self, tensor: Tensor) -> list[Tensor]:
        state = self.optimizer.state[tensor]
        if self.is_sgd:
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(tensor, memory_format=torch.preserve_format)
            return [state["momentum_buffer"]]
        if not state:
            state.update(_initial_state(self.optimizer, tensor))
        return [
            value
            for _, value in sorted(state.items())
            if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
        ]


def _initial_state(optimizer: torch.optim.Optimizer, tensor: Tensor) -> dict[str, Any]:
    """Returns the state that the optimizer would make for a parameter like ``tensor``, with all tensors zero.

    A copy of the optimizer, without its hooks, takes a step on a zero gradient.

    Raises:
        ValueError: the optimizer cannot be copied so.
    """
    group = next(g for g in optimizer.param_groups if any(p is tensor for p in g["params"]))
    with torch.enable_grad():
        twin = torch.zeros_like(tensor, requires_grad=True)
    twin.grad = torch.zeros_like(tensor)
    other = type(optimizer).__new__(type(optimizer))
    groups = [{**group, "params": [twin]}]
    try:
        other.__setstate__(
            {"defaults": optimizer.defaults, "state": defaultdict(dict), "param_groups": groups}
        )
        other.step()
    except Exception as error:
        raise ValueError(
            f"a parameter of shape {tuple(tensor.shape)} has no state on this rank, and a copy of "
            f"{type(optimizer).__name__} cannot make one: say moments='leave'"
        ) from error
    state: dict[str, Any] = other.state[twin]
    for value in state.values():
        if isinstance(value, Tensor):
            value.zero_()
    return state
