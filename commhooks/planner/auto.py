"""``SparseState.auto``: probe, decide, configure."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from ..aggregators import Aggregator, AllGather, Dense, GTopK, SharedIndices
from ..selectors import RandomK, Selector, TopK
from ..state import SparseState
from .choice import DENSITIES, Plan, choose
from .probe import probe, slowest

logger = logging.getLogger(__name__)


def auto(
    cls: type[SparseState],
    model: torch.nn.Module | int,
    transport: str = "distributed",
    *,
    densities: Sequence[float] = DENSITIES,
    backward_s: float = 0.0,
    device: torch.device | str | None = None,
    timeout_s: float = 60.0,
    process_group: Any = None,
    **options: Any,
) -> SparseState:
    """See :meth:`commhooks.SparseState.auto`.

    Raises:
        ValueError: ``model`` has no parameters, or a density is out of range.
    """
    numel, largest = sizes_of(model)
    if device is None:
        device = next(model.parameters()).device if isinstance(model, torch.nn.Module) else "cpu"
    plan = make_plan(
        transport,
        numel,
        largest,
        densities=densities,
        backward_s=backward_s,
        device=torch.device(device),
        timeout_s=timeout_s,
        process_group=process_group,
    )
    shared = {**options, "timeout_s": timeout_s, "process_group": process_group}
    if plan.scheme == "dense":
        state = cls(None, Dense(transport), None, **shared)
    else:
        selector, aggregator = configured(plan, transport)
        state = cls(selector, aggregator, **{"dense_crossover": plan, **shared})
    state.plan = plan
    return state


def make_plan(
    transport: str,
    numel: int,
    largest_numel: int = 0,
    *,
    densities: Sequence[float] = DENSITIES,
    backward_s: float = 0.0,
    device: torch.device | str = "cpu",
    timeout_s: float = 60.0,
    process_group: Any = None,
) -> Plan:
    """Opens a transport, probes, closes it and decides; a collective call. Rank 0 logs the plan."""
    opener = Dense(transport)
    device = torch.device(device)
    opened = opener.open(timeout_s=timeout_s, process_group=process_group, device_type=device.type)
    try:
        costs = probe(opened, numel, device)
        backward_s = slowest(opened, [backward_s])[0]
        rank, world_size = opened.rank, opened.world_size
    finally:
        opener.close()
    plan = choose(
        costs, numel, world_size, backward_s=backward_s, densities=densities, largest_numel=largest_numel
    )
    if rank == 0:
        logger.info("%s ranks, %s parameters: %s; %s", world_size, numel, plan.summary(), plan.reason)
    return plan


def configured(plan: Plan, transport: str) -> tuple[Selector, Aggregator]:
    """Selector and aggregator of a plan that compresses."""
    if plan.scheme == "randomk":
        return RandomK(plan.density), SharedIndices(transport)
    if plan.scheme == "topk":
        return TopK(plan.density), AllGather(transport)
    return TopK(plan.density), GTopK(transport)


def sizes_of(model: torch.nn.Module | int) -> tuple[int, int]:
    """``(parameters in all, elements of the largest)`` of what wants a gradient; of a number: itself, 0."""
    if isinstance(model, int) and not isinstance(model, bool):
        if model < 1:
            raise ValueError(f"model must have at least one parameter, got {model}")
        return model, 0
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a Module or a number of parameters, got {type(model).__name__}")
    numels = [p.numel() for p in model.parameters() if p.requires_grad]
    if not sum(numels):
        raise ValueError("model has no parameters that require a gradient")
    return sum(numels), max(numels)
