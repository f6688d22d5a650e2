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


def check_states(states: list[dict[str, Any]], is_list: bool, rank: int, world_size: int) -> None:
    """Raises ``ValueError`` for states that do not belong together or not to this rank and world size."""
    if not states:
        raise ValueError("load_state_dict got an empty list")
    saved = int(states[0]["world_size"])
    if is_list and [int(s["rank"]) for s in states] != list(range(saved)):
        raise ValueError(
            f"load_state_dict needs the states of all {saved} ranks in rank order, "
            f"got ranks {[s['rank'] for s in states]}"
        )
    if not is_list and saved != world_size:
        raise ValueError(
            f"this state is of a run with {saved} ranks and this one has {world_size}: "
            "pass the list of all ranks' states, so that residuals can be redistributed"
        )
    if not is_list and int(states[0]["rank"]) != rank:
        raise ValueError(f"this is rank {rank} and the state is rank {states[0]['rank']}'s")
