"""Checks which optimizers go with gradients that arrive sparse and late."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from ..errors import callers_level
from ..exchange import Aggregator, LowBit
from ..memory import Memory
from ..selection.selectors import RandomK, Selector

_SECOND_MOMENT = (torch.optim.Adadelta, torch.optim.Adagrad, torch.optim.RMSprop, torch.optim.Rprop)
"""The optimizers of torch that scale by past magnitudes and have none of the options below."""
_SECOND_MOMENT_OPTIONS = ("betas", "beta2", "beta2_decay", "decay_rate")
"""Options that tell such optimizers. The last two are Adafactor's, of torch and of other libraries."""


def momentum_of(optimizer: torch.optim.Optimizer | None) -> float:
    """Returns the largest ``momentum`` of the optimizer's parameter groups, or 0 where none has it."""
    groups = [] if optimizer is None else optimizer.param_groups
    return max((float(g.get("momentum") or 0.0) for g in groups), default=0.0)


def has_second_moment(optimizer: torch.optim.Optimizer | None) -> bool:
    """Whether the optimizer divides a gradient by its past magnitudes. All with ``betas`` count."""
    groups = [] if optimizer is None else optimizer.param_groups
    told = any(option in group for group in groups for option in _SECOND_MOMENT_OPTIONS)
    return told or isinstance(optimizer, _SECOND_MOMENT)


def is_plain_sgd(optimizer: torch.optim.Optimizer | None, memory: Memory | None) -> bool:
    """Whether the optimizer is an SGD, and neither it nor the memory has momentum."""
    if optimizer is None or has_second_moment(optimizer) or _momentum_in(memory) != 0.0:
        return False
    return isinstance(optimizer, torch.optim.SGD) and momentum_of(optimizer) == 0.0


def check_optimizer(
    memory: Memory | None, selector: Selector | None, optimizer: Any, aggregator: Aggregator | None = None
) -> None:
    """Refuses combinations that do not train, and warns of doubtful ones. Called before data is sent.

    Warns:
        UserWarning: momentum, or weight decay, in the memory and in the optimizer; weight decay in the
            optimizer behind momentum in the memory; random-k with momentum anywhere; L-BFGS.

    Raises:
        TypeError: ``optimizer`` has no ``param_groups``.
        ValueError: momentum in the memory under an optimizer with a second moment.
    """
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        raise TypeError(f"optimizer must be a torch optimizer, got {type(optimizer).__name__}")
    ours, theirs, name = _momentum_in(memory), momentum_of(optimizer), type(optimizer).__name__
    if ours > 0.0 and has_second_moment(optimizer):
        raise ValueError(
            f"ErrorFeedback's momentum {ours:g} does not go with {name}: what is sent late would be "
            "scaled by the wrong second moment, and training stalls. Write ErrorFeedback() and leave the "
            f"momentum to {name}"
        )
    if ours > 0.0 and theirs > 0.0:
        _warn(
            f"the optimizer's momentum {theirs:g} and ErrorFeedback's {ours:g} both act: momentum belongs to "
            "one place, set the optimizer's to 0"
        )
    theirs_decay = max(
        (float(g.get("weight_decay") or 0.0) for g in getattr(optimizer, "param_groups", ())), default=0.0
    )
    if memory is not None and memory.decays and theirs_decay > 0.0:
        _warn(
            f"the optimizer's weight_decay {theirs_decay:g} and ErrorFeedback's both act: weight decay "
            "belongs to one place, set the optimizer's to 0"
        )
    elif ours > 0.0 and theirs_decay > 0.0:
        _warn(
            f"the optimizer's weight_decay {theirs_decay:g} acts behind ErrorFeedback's momentum {ours:g}: "
            f"weights decay about {1.0 / (1.0 - ours):.0f} times slower than with both in the optimizer. "
            "Write ErrorFeedback(weight_decay=...) and set the optimizer's to 0, or use for_optimizer"
        )
    momentum = max(ours, theirs) or max(
        (_first_beta(g) for g in getattr(optimizer, "param_groups", ())), default=0.0
    )
    if isinstance(selector, RandomK) and momentum > 0.0:
        where = "ErrorFeedback" if ours > 0.0 else f"the optimizer {name}"
        _warn(
            f"random-k diverges with momentum (here {momentum:g}, in {where}): what a place has withheld "
            "arrives at once and is multiplied. Use top-k, or SGD without momentum"
        )
    compresses = selector is not None or isinstance(aggregator, LowBit)
    if isinstance(optimizer, torch.optim.LBFGS) and compresses:
        _warn("L-BFGS diverges: the gradients that it compares are compressed, each in another way. Use SGD")


def _momentum_in(memory: Memory | None) -> float:
    return float(getattr(memory, "momentum", 0.0))


def _first_beta(group: dict[str, Any]) -> float:
    betas = group.get("betas") or (0.0,)
    return float(betas[0])


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=callers_level())
