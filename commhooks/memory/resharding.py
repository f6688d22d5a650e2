"""Turns the residuals of a run with P ranks into those of a run with Q ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def check_entries(state: Any, entries: Sequence[str]) -> None:
    """Raises ``ValueError`` unless ``state`` is a mapping with these entries.

    Where a whole checkpoint was passed, the message names the entry to pass.
    """
    if isinstance(state, Mapping) and all(name in state for name in entries):
        return
    if not isinstance(state, Mapping):
        found, advice = type(state).__name__, ""
    else:
        inside = [k for k, v in state.items() if isinstance(v, Mapping) and all(n in v for n in entries)]
        found = f"a mapping with {', '.join(map(repr, list(state)[:8])) or 'nothing'}"
        advice = f": pass its entry {inside[0]!r}" if inside else ""
    raise ValueError(
        f"load_state_dict needs what state_dict() returned ({', '.join(entries)}), got {found}{advice}"
    )


def check_states(states: list[dict[str, Any]], is_list: bool, rank: int, world_size: int) -> None:
    """Checks the argument of ``load_state_dict``.

    Raises:
        ValueError: something else than states, a list that is not all ranks' states in rank order, or one
            state of another rank or world size.
    """
    if not states:
        raise ValueError("load_state_dict got an empty list")
    for state in states:
        check_entries(state, ("rank", "world_size", "step", "residual", "velocity"))
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
