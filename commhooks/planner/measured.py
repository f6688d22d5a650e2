"""Makes the plan of one job: measures over its ranks, decides, and tells the decision."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch

from ..native.speed import why_slow
from ..transports import Connection, Transport
from ..transports.announce import tell
from .plan import Job, Plan, choose, settle
from .probe import probe, slowest

logger = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 60.0
"""Seconds until a rank that is missing at the probe is an error. It is short, since ranks start together."""
ROUNDS = 3
"""The number of measurements. The most cautious plan among theirs is taken."""


def plan_for(
    transport: str | Transport,
    job: Job,
    *,
    device: torch.device | str = "cpu",
    timeout_s: float = PROBE_TIMEOUT_S,
    process_group: Any = None,
) -> Plan:
    """Opens a transport, measures, closes it and decides. A collective call.

    Rank 0 tells the choice in one line: in the log where the level INFO of ``commhooks.planner`` is shown,
    else on stderr. A rank without native kernels warns: the plan is then one for the torch operators in their
    place, which compress more slowly.

    Args:
        transport: ``"distributed"``, ``"mpi"``, or a ready ``Transport``, which stays open.
        job: the job to plan for, the same on all ranks except ``backward_s``, whose largest value counts.
        device: where gradients live.
        timeout_s: seconds until a missing rank is an error.
        process_group: whose ranks take part. None: the default group.
    """
    opener, device = Connection(transport), torch.device(device)
    slow = why_slow(device.type)
    if slow is not None:
        logger.warning("%s. The plan is for them. scripts/setup builds the kernels in a checkout", slow)
    opened = opener.open(timeout_s=timeout_s, process_group=process_group, device_type=device.type)
    try:
        plan, rank = measured_plan(opened, job, device), opened.rank
    finally:
        if isinstance(transport, str):
            opener.close()
    if rank == 0:
        tell(logger, f"commhooks: {plan}")
    return plan


def measured_plan(transport: Transport, job: Job, device: torch.device | str = "cpu") -> Plan:
    """Measures ``ROUNDS`` times over an open transport and decides. A collective call.

    The plan is the same on all ranks. Its reason says where a rank has no native kernels.
    """
    slow = slow_rank(transport, device)
    rounds = [probe(transport, job.numel, device) for _ in range(ROUNDS)]
    job = replace(job, backward_s=slowest(transport, [job.backward_s])[0])
    plan = settle([choose(costs, job, transport.world_size) for costs in rounds])
    if slow is None:
        return plan
    return replace(plan, reason=f"{plan.reason}; rank {slow} has no native kernels and is slower for it")


def slow_rank(transport: Transport, device: torch.device | str = "cpu") -> int | None:
    """Returns a rank that has no native kernels for ``device``. None: all have. A collective call."""
    lacks = why_slow(torch.device(device).type) is not None
    found = int(slowest(transport, [float(transport.rank + 1 if lacks else 0)])[0])
    return found - 1 if found else None


def sizes_of(model: torch.nn.Module | int) -> tuple[int, int]:
    """Returns the sizes of a model: ``(elements in all, elements of the largest parameter)``.

    Only parameters that require a gradient count. For a number n it returns ``(n, 0)``.

    Raises:
        TypeError: ``model`` is neither a module nor a number.
        ValueError: no parameter requires a gradient.
    """
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
