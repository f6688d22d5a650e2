"""The optimizers of train.py: SGD, AdamW, and Muon with AdamW for what is no hidden matrix."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .muon import Muon

OPTIMIZERS = ("sgd", "adamw", "muon")


def make(model: nn.Module, options: Any, in_memory: bool = False) -> Any:
    """The optimizer that `--optimizer` names; the loop sets the learning rate of each step.

    Args:
        model: its parameters are trained.
        options: the command line: `optimizer`, `lr`, `momentum`, `weight_decay`, `beta2`, `nesterov`.
        in_memory: SGD's momentum, Nesterov's form and weight decay are in the memory of a sparse hook, not here.

    Raises:
        ValueError: Muon for a model without a hidden matrix.
    """
    if options.optimizer == "sgd" and in_memory:
        return torch.optim.SGD(model.parameters(), lr=options.lr)
    if options.optimizer == "sgd":
        return torch.optim.SGD(
            model.parameters(),
            lr=options.lr,
            momentum=options.momentum,
            nesterov=options.nesterov and options.momentum > 0.0,
            weight_decay=options.weight_decay,
        )
    if options.optimizer == "adamw":
        return adamw(model.named_parameters(), options)
    named = list(model.named_parameters())
    hidden = [p for name, p in named if is_hidden_matrix(model, name, p)]
    if not hidden:
        raise ValueError("--optimizer muon is for hidden matrices, and this model has none")
    chosen = {id(p) for p in hidden}
    # its update has the size of AdamW's, so both take one learning rate
    muon = Muon(hidden, lr=options.lr, weight_decay=options.weight_decay)
    return MuonAndAdamW(muon, adamw(((name, p) for name, p in named if id(p) not in chosen), options))


def adamw(named: Iterable[tuple[str, torch.Tensor]], options: Any) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves gains and biases alone."""
    decayed, others = [], []
    for _, parameter in named:
        (decayed if parameter.dim() >= 2 else others).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": options.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    filled = [group for group in groups if group["params"]]
    return torch.optim.AdamW(filled, lr=options.lr, betas=(0.9, options.beta2))


def is_hidden_matrix(model: nn.Module, name: str, parameter: torch.Tensor) -> bool:
    """Whether it is the weight of a linear layer that is neither an embedding nor tied to one."""
    owner = model.get_submodule(name.rpartition(".")[0])
    return isinstance(owner, nn.Linear) and parameter.dim() == 2


class MuonAndAdamW:
    """Two optimizers that step as one.

    Attributes:
        param_groups: those of both.
    """

    def __init__(self, muon: torch.optim.Optimizer, adamw: torch.optim.Optimizer) -> None:
        self.parts = {"muon": muon, "adamw": adamw}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts.values() for group in part.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients of all parameters."""
        for part in self.parts.values():
            part.zero_grad(set_to_none=set_to_none)

    def step(self) -> None:
        """One step of both."""
        for part in self.parts.values():
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """The states of both, by name."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over the states of both."""
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
