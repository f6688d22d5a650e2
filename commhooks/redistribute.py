"""Residuals of a run with P ranks for a run with Q ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def redistributed(
    states: Sequence[dict[str, Any]], rank: int, world_size: int
) -> dict[str, dict[str, Tensor]]:
    """The residuals and velocities of ``rank`` out of all ranks' states of a run with another world size.

    New rank q takes the old ranks p = q, q + Q, ... and their sum times Q / P, so that the average over
    ranks, which is what enters the model, is kept exactly up to rounding.

    Args:
        states: state dicts of all P old ranks, in rank order.
        rank: q, the new rank.
        world_size: Q, the new number of ranks.
    """
    factor = world_size / len(states)
    result: dict[str, dict[str, Tensor]] = {"residual": {}, "velocity": {}}
    for kind, merged in result.items():
        for state in states[rank::world_size]:
            for name, tensor in state[kind].items():
                share = tensor * factor
                merged[name] = merged[name] + share if name in merged else share
    return result
