"""Joins the ranks' checkpoints into one, so that a run can continue with another number of workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .flat import real_view
from .wired_change import joined


def average_checkpoints(checkpoints: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Joins the ranks' checkpoints into one from which any number of workers can continue.

    Between synchronisations the ranks' models differ, so one rank's file does not hold the run. The joined
    checkpoint holds the plain mean of the models: without weights and without a step of block momentum.
    ``BlockMomentum``'s ``w~`` and ``v`` are kept, so that its block continues.

    Args:
        checkpoints: one per rank, in order of ranks: mappings with the same keys. A value may be the state
            dict of a model, an optimizer, an averager or an LR scheduler, or a plain value.

    Returns:
        A new mapping with the same keys. Floating and complex tensors are averaged (in float64, rounded
        back): parameters, BatchNorm statistics, momentum buffers and Adam's moments. Everything else is
        rank 0's. A tensor that some ranks lack (a momentum buffer whose parameter had no gradient there)
        counts as zero on them. Averagers' states hold all ranks' reducer memories and what the owners on a
        wire keep, and can be loaded at any world size.

    Raises:
        ValueError: no checkpoint, or keys or shapes differ.
    """
    if not checkpoints:
        raise ValueError("checkpoints must hold at least one")
    result = _join(list(checkpoints), "checkpoint")
    if not isinstance(result, dict):
        raise ValueError(f"checkpoints must be mappings, got {type(checkpoints[0]).__name__}")
    return result


def _join(values: list[Any], path: str) -> Any:
    first = values[0]
    if _is_averager_state(first):
        return _join_averagers(values, path)
    if isinstance(first, Tensor):
        return _mean(values, path)
    if isinstance(first, Mapping):
        return _join_mappings(values, path)
    if isinstance(first, (list, tuple)):
        lengths = {len(v) for v in values}
        if len(lengths) != 1:
            raise ValueError(f"{path} must have one length on all ranks, got {sorted(lengths)}")
        return type(first)(
            _join(list(column), f"{path}[{i}]") for i, column in enumerate(zip(*values, strict=True))
        )
    return first


def _join_mappings(values: list[Any], path: str) -> dict[Any, Any]:
    keys = {key: None for value in values for key in value}  # of all ranks, in order
    joined: dict[Any, Any] = {}
    for key in keys:
        column = [value[key] if key in value else None for value in values]
        present = [entry for entry in column if entry is not None]
        if not present:
            joined[key] = None
        elif len(present) == len(column):
            joined[key] = _join(column, f"{path}.{key}")
        elif isinstance(present[0], Tensor):
            zero = torch.zeros_like(present[0])
            joined[key] = _mean([zero if entry is None else entry for entry in column], f"{path}.{key}")
        elif isinstance(present[0], Mapping) and not path.endswith("checkpoint"):
            joined[key] = _join_mappings([{} if c is None else c for c in column], f"{path}.{key}")
        else:
            missing = [rank for rank, entry in enumerate(column) if entry is None]
            raise ValueError(f"{path}.{key} is missing on ranks {missing}")
    return joined


def _mean(tensors: list[Tensor], path: str) -> Tensor:
    shapes = {tuple(t.shape) for t in tensors}
    if len(shapes) != 1:
        raise ValueError(f"{path} must have one shape on all ranks, got {sorted(shapes)}")
    first = tensors[0]
    if not (first.is_floating_point() or first.is_complex()):
        return first.clone()
    total = torch.zeros_like(real_view(first), dtype=torch.float64)
    for tensor in tensors:
        total += real_view(tensor).to(total)
    mean = torch.empty_like(first)
    real_view(mean).copy_(total / len(tensors))
    return mean


def _is_averager_state(value: Any) -> bool:
    return isinstance(value, Mapping) and {"synchronisations", "shared", "world_size", "reducers"} <= set(
        value
    )


def _join_averagers(states: list[Any], path: str) -> dict[str, Any]:
    for name in ("step", "synchronisations", "world_size"):
        seen = {state[name] for state in states}
        if len(seen) != 1:
            raise ValueError(f"{path}.{name} must be the same on all ranks, got {sorted(seen)}")
    ranks, size = [state["rank"] for state in states], states[0]["world_size"]
    if ranks != list(range(size)):
        raise ValueError(f"{path} must be of ranks 0 to {size - 1} in order, got {ranks}")
    first = {key: value for key, value in states[0].items() if key != "model"}  # one rank's checksum
    if first["reducers"] is not None:
        first["reducers"] = [reducer for state in states for reducer in state["reducers"]]
    if "wire" in first:
        first["wire"] = joined([state["wire"] for state in states])
    return {**first, "rank": None, "world_size": None}
