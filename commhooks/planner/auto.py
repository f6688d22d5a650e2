"""``SparseState.auto``: probe, decide, configure."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from ..ddp.state import SparseState
from ..exchange import Dense
from ..memory import ErrorFeedback, Memory, NoMemory
from ..schemes import make_parts
from ..transports import DEFAULT_TIMEOUT_S, Connection, Transport
from .plan import BUCKET_MB, DENSITIES, Plan, check_request, choose
from .probe import probe, slowest

logger = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 60.0
"""Seconds until a rank that is missing at the probe is an error: ranks begin together, no one evaluates yet."""


def auto(
    cls: type[SparseState],
    model: torch.nn.Module | int,
    transport: str | Transport = "distributed",
    *,
    densities: Sequence[float] = DENSITIES,
    backward_s: float = 0.0,
    device: torch.device | str | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    probe_timeout_s: float = PROBE_TIMEOUT_S,
    process_group: Any = None,
    **options: Any,
) -> SparseState:
    """See :meth:`commhooks.SparseState.auto`.

    A wrapped model's plan is for the bucket cap that the model has; for any other the plan proposes one.

    Args:
        cls: the class of the state.
        model: the module, or its number of parameters.
        transport: as an aggregator's.
        densities: allowed ones.
        backward_s: seconds of one backward, which hides communication; the slowest rank's counts. 0: unknown.
        device: where gradients live; default: the model's, the CPU for a number.
        timeout_s: the state's.
        probe_timeout_s: seconds until a missing rank is an error while probing.
        process_group: whose ranks take part.
        options: of ``cls``. A ``memory`` is kept by a dense plan too if it has more to do there than keep what was not sent
            (:func:`dense_memory`).

    Raises:
        ValueError: ``model`` has no parameters, or a density or a time is out of range.
    """
    numel, largest = sizes_of(model)
    if device is None:
        device = next(model.parameters()).device if isinstance(model, torch.nn.Module) else "cpu"
    cap = bucket_cap_mb(model)
    plan = make_plan(
        transport,
        numel,
        largest,
        densities=densities,
        backward_s=backward_s,
        bucket_mb=BUCKET_MB if cap is None else (cap,),
        device=torch.device(device),
        timeout_s=probe_timeout_s,
        process_group=process_group,
    )
    shared = {**options, "timeout_s": timeout_s, "process_group": process_group}
    if plan.scheme == "dense":
        state = cls(
            None, Dense(transport), **{**shared, "memory": dense_memory(options.get("memory")) or NoMemory()}
        )
    else:
        selector, aggregator, _ = make_parts(plan.scheme, plan.density, transport)
        state = cls(selector, aggregator, **{"dense_crossover": plan, **shared})
    state.plan = plan
    return state


def make_plan(
    transport: str | Transport,
    numel: int,
    largest_numel: int = 0,
    *,
    densities: Sequence[float] = DENSITIES,
    backward_s: float = 0.0,
    bucket_mb: Sequence[float] = BUCKET_MB,
    device: torch.device | str = "cpu",
    timeout_s: float = PROBE_TIMEOUT_S,
    process_group: Any = None,
) -> Plan:
    """Opens a transport, probes, closes it and decides; a collective call. Rank 0 logs the plan."""
    check_request(numel, densities, backward_s)
    opener = Connection(transport)
    device = torch.device(device)
    opened = opener.open(timeout_s=timeout_s, process_group=process_group, device_type=device.type)
    try:
        costs = probe(opened, numel, device)
        backward_s = slowest(opened, [backward_s])[0]
        rank, world_size = opened.rank, opened.world_size
    finally:
        if isinstance(transport, str):  # what was given open belongs to the caller
            opener.close()
    plan = choose(
        costs,
        numel,
        world_size,
        backward_s=backward_s,
        densities=densities,
        largest_numel=largest_numel,
        bucket_mb=bucket_mb,
    )
    if rank == 0:
        logger.info("%s ranks, %s parameters: %s; %s", world_size, numel, plan.summary(), plan.reason)
    return plan


def dense_memory(memory: Memory | None) -> Memory | None:
    """``memory``, or None where it would only cost a pass: a dense exchange withholds nothing.

    Momentum and clipping act there too. Without them the model would train by another rule than the one asked for: momentum in
    the memory stands for the optimizer's, which is 0 then. A memory of the user's own is kept, whatever it does.
    """
    if isinstance(memory, NoMemory):
        return None
    if type(memory) is ErrorFeedback and memory.momentum == 0.0 and memory.clip_norm is None:
        return None
    return memory


def bucket_cap_mb(model: torch.nn.Module | int) -> float | None:
    """The ``bucket_cap_mb`` a wrapped model was made with; None for any other model."""
    cap = getattr(model, "bucket_bytes_cap", None) if isinstance(model, DistributedDataParallel) else None
    return cap / (1 << 20) if cap else None


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
