"""What a checkpoint says of the memory in it, and whether that memory fits the state that loads it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..memory import Memory
from ..memory.parameter_memory import VERSION
from ..selection.selectors import RandomK, Selector

logger = logging.getLogger(__name__)

_HINT = "strict=False loads it all the same"


def description(selector: Selector | None, aggregator: str, memory: Memory) -> dict[str, Any]:
    """Returns the names of the three parts, and the momentum, as plain values.

    Args:
        selector: chooses what is sent. None: everything is.
        aggregator: the name of what sums the ranks' selections.
        memory: keeps the rest.
    """
    return {
        "selector": None if selector is None else type(selector).__name__,
        "aggregator": aggregator,
        "memory": type(memory).__name__,
        **_momentum(memory),
    }


def check_fits(saved: Mapping[str, Any], selector: Selector | None, memory: Memory, strict: bool) -> None:
    """Checks that a saved memory fits the state that loads it.

    Args:
        saved: a ``state_dict``. One of version 1 does not say what made it.
        selector: of the state that loads it.
        memory: likewise.
        strict: False: what does not fit is logged instead.

    Raises:
        ValueError: a part of the memory would be dropped, random-k would go on with momentum, or the format
            is of a later version of commhooks.
    """
    version = saved.get("version", 1)
    if version > VERSION:
        raise ValueError(
            f"the checkpoint has format version {version} and this version of commhooks reads up to "
            f"{VERSION}: load it with a later version"
        )
    made_by, problems = saved.get("scheme", {}), []
    shown = f" (saved by {_shown(made_by)})" if made_by else ""
    if not memory.table.with_residual and (held := len(_filled(saved, "residual", "owned"))):
        text = (
            f"the residuals of {held} parameters would be lost{shown}: this state has no memory. Make the "
            "state as it was made before, or give it ErrorFeedback()"
        )
        if made_by:
            problems.append(text)
        else:  # version 1 saved what NoMemory had dropped, too
            complain([text], strict=False)
    if not memory.table.with_velocity and _filled(saved, "velocity"):
        problems.append(
            f"the velocities would be lost{shown}: this memory has no momentum. Make the memory with the "
            "saved momentum"
        )
    elif made_by and isinstance(selector, RandomK) and memory.table.with_velocity:
        if made_by["selector"] != type(selector).__name__:
            problems.append(f"random-k diverges with momentum{shown}. Make the state as it was made before")
    complain(problems, strict)


def check_units(saved: Mapping[str, Any], units: str, strict: bool) -> None:
    """Checks that a saved memory has the units of the gradients here.

    Args:
        saved: a ``state_dict``. One of version 1 does not tell its units.
        units: ``"unscaled"`` where the state has a scaler and divides by its loss scale, else ``"as given"``.
        strict: False: a difference is logged instead.

    Raises:
        ValueError: the units differ and something is withheld.
    """
    before = saved.get("units", units)
    if before == units or not withheld(saved):
        return
    if units == "as given":
        text = (
            "the memory was saved by a state with a grad_scaler, in units of unscaled gradients, and this "
            "state has none: pass grad_scaler=scaler, or GradScaler(enabled=False) where the loss is not "
            "scaled now"
        )
    else:
        text = (
            "the memory was saved by a state without a grad_scaler, in units of the gradients it was given, "
            "and this state has one. If the loss was not scaled then, the units are the same. Else divide "
            "residuals and velocities by the loss scale first"
        )
    complain([text], strict)


def complain(problems: list[str], strict: bool) -> None:
    """Raises ``ValueError`` with the problems, or logs them where ``strict`` is False."""
    if problems and strict:
        raise ValueError("; ".join(problems) + f". {_HINT}")
    for problem in problems:
        logger.warning("%s. It is loaded all the same", problem)


def in_units_of(memory: Memory, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ``saved`` with velocities as ``memory`` keeps them: Nesterov's are ``(1 + momentum) * v``.

    A state of version 1 stays as it is, because it does not say how its velocities were kept.
    """
    made_by = saved.get("scheme")
    if not made_by:
        return dict(saved)
    factor = _velocity_unit(**_momentum(memory)) / _velocity_unit(made_by["momentum"], made_by["nesterov"])
    if factor == 1.0:
        return dict(saved)
    return {**saved, "velocity": {name: values * factor for name, values in saved["velocity"].items()}}


def withheld(saved: Mapping[str, Any]) -> set[str]:
    """Returns the names of the parameters of which something was withheld or has a velocity."""
    return _filled(saved, "residual", "velocity", "owned")


def _momentum(memory: Memory) -> dict[str, Any]:
    return {
        "momentum": float(getattr(memory, "momentum", 0.0)),
        "nesterov": bool(getattr(memory, "nesterov", False)),
    }


def _velocity_unit(momentum: float, nesterov: bool) -> float:
    return 1.0 + momentum if nesterov else 1.0


def _filled(saved: Mapping[str, Any], *kinds: str) -> set[str]:
    """The names of the parameters of which something that is not zero was saved."""
    names = set()
    for kind in kinds:
        for name, values in saved.get(kind, {}).items():
            tensors = [values] if isinstance(values, Tensor) else values.values()
            if any(bool(tensor.any()) for tensor in tensors):
                names.add(name)
    return names


def _shown(made_by: Mapping[str, Any]) -> str:
    parts = ", ".join(str(made_by[part]) for part in ("selector", "aggregator", "memory") if made_by[part])
    return f"{parts}, momentum {made_by['momentum']:g}"
