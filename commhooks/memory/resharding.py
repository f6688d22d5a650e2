"""Turns the residuals of a run with P ranks into those of a run with Q ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .owner_memory import gathered


def redistributed(states: Sequence[dict[str, Any]], rank: int, world_size: int) -> dict[str, dict[str, Any]]:
    """Returns the residuals and velocities of one rank, from a run with another world size.

    New rank q sums the tensors of the old ranks p = q, q + Q, ... and multiplies the sum by Q / P. So the
    average over ranks, which is what enters the model, is kept up to rounding.

    Args:
        states: state dicts of all P old ranks, in rank order.
        rank: q, the new rank.
        world_size: Q, the new number of ranks.

    Returns:
        ``{"residual": {name: tensor}, "velocity": {name: tensor}}``, in new memory. A name is missing where
        rank q takes over no old rank (q >= P). ``"owned"``, the pieces that the old ranks owned, which are
        means over ranks already.
    """
    factor = world_size / len(states)
    result: dict[str, dict[str, Tensor]] = {"residual": {}, "velocity": {}}
    for kind, merged in result.items():
        for state in states[rank::world_size]:
            for name, tensor in state[kind].items():
                share = tensor * factor
                merged[name] = merged[name] + share if name in merged else share
    return {**result, "owned": gathered(list(states[rank::world_size]))}


def check_states(states: list[dict[str, Any]], is_list: bool, rank: int, world_size: int) -> None:
    """Checks the argument of ``load_state_dict``.

    Raises:
        ValueError: a list that is not all ranks' states in rank order, or one state of another rank or world
            size.
    """
    if not states:
        raise ValueError("load_state_dict got an empty list")
    saved = int(states[0]["world_size"])
    if is_list and [int(s["rank"]) for s in states] != list(range(saved)):
        raise ValueError(
            f"load_state_dict needs the states of all {saved} ranks in rank order, got ranks "
            f"{[s['rank'] for s in states]}"
        )
    if not is_list and saved != world_size:
        raise ValueError(
            f"this state is of a run with {saved} ranks and this one has {world_size}: pass the list of all "
            "ranks' states, so that residuals can be redistributed"
        )
    if not is_list and int(states[0]["rank"]) != rank:
        raise ValueError(f"this is rank {rank} and the state is rank {states[0]['rank']}'s")
