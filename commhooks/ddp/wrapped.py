"""Finds the DDP model inside the wrappers of Fabric and ``torch.compile``; checks that its group is known."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..transports import OVER_TORCH
from ..transports.connection import Connection
from ..transports.own_group import smaller_groups

_INNER = {"OptimizedModule": "_orig_mod", "_FabricModule": "_forward_module"}
"""Class names of wrappers, and the attribute that holds what they wrap."""


def find_ddp(model: Any) -> DistributedDataParallel | None:
    """Returns ``model`` itself, or the DDP model that it wraps, or None if there is none."""
    while not isinstance(model, DistributedDataParallel):
        attribute = _INNER.get(type(model).__name__)
        if attribute is None:
            return None
        model = getattr(model, attribute, None)
    return model


def require_ddp(model: Any) -> DistributedDataParallel:
    """Returns the DDP model in ``model``.

    Raises:
        TypeError: there is none. The message says what to pass.
    """
    found = find_ddp(model)
    if found is None:
        raise TypeError(
            f"model must be a DistributedDataParallel, got {type(model).__name__}: {_advice(model)}"
        )
    return found


def _advice(model: Any) -> str:
    kinds = [kind.__name__ for kind in type(model).__mro__]
    if any(kind in ("FullyShardedDataParallel", "FSDPModule") for kind in kinds):
        return "FSDP shards gradients before its hooks and is not supported"
    if not isinstance(model, nn.Module):
        return "pass the model that DistributedDataParallel returned"
    for name, child in model.named_modules():
        if isinstance(child, DistributedDataParallel):
            return f"pass its part {name!r}, which is one"
    if any(type(model).__name__ == wrapper for wrapper in _INNER):
        return "what it wraps is none: wrap the model in DistributedDataParallel first"
    return "wrap it first: model = DistributedDataParallel(model)"


def plain_name(name: str) -> str:
    """Removes what ``torch.compile`` adds to a name: checkpoints then fit with and without it."""
    return name.replace("_orig_mod.", "")


def check_group(process_group: Any, connection: Connection) -> None:
    """Raises ``ValueError`` where it is unknown over which ranks DDP averages.

    A hook that ``register_comm_hook`` registered does not see DDP's process group. Without ``process_group``
    it takes all ranks, which is refused in a job that has groups of fewer ranks.
    """
    by_name = connection.requested in (*OVER_TORCH, "mpi")
    if process_group is not None or connection.is_open or not by_name:
        return
    if groups := smaller_groups():
        raise ValueError(
            f"this rank is in process groups of fewer ranks than the job has, such as {groups[0]}, and the "
            "hook does not know over which group DDP averages: attach the state with "
            "commhooks.register(ddp_model, state), or pass process_group= to the state "
            "(process_group=torch.distributed.group.WORLD for all ranks)"
        )
