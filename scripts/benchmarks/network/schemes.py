"""What is compared: how each scheme is attached to a DDP model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from commhooks import Dense, SparseState, register
from commhooks.memory import Memory
from commhooks.schemes import Parts, make_parts

PEERS = ("dense", "fp16", "bf16", "powersgd1", "powersgd2", "powersgd4")
OURS = ("topk", "gtopk", "gtopk-tree", "randomk")
"""Of the library's table of schemes (`commhooks.schemes.SCHEMES`), those that are compared."""
LOW_BIT = "lowbit"
"""Ours that sends every element in 4 bits; `scripts/bench lowbit` compares it."""
AUTO = "auto"
PLAIN = "plain"
"""What the planner gives for "do not compress": ours without selector and memory."""
MPI_SUFFIX = "-mpi"
SCHEMES = ("none", *PEERS, *OURS, AUTO, *(name + MPI_SUFFIX for name in OURS))
"""`none` communicates nothing. A name of ours alone uses gloo, with `-mpi` MPI. `auto` is what the planner
chooses among them over gloo. The rest is torch's own over gloo."""


@dataclass
class Attached:
    """A DDP model with a scheme on it. `state`: our SparseState, or None."""

    model: DistributedDataParallel
    state: SparseState | None


def is_ours(scheme: str) -> bool:
    """Whether the scheme is one of commhooks'."""
    return scheme.removesuffix(MPI_SUFFIX) in (*OURS, LOW_BIT, AUTO, PLAIN)


def attach(
    scheme: str,
    module: torch.nn.Module,
    density: float,
    bucket_mb: float | None = None,
    memory: Memory | None = None,
) -> Attached:
    """Wraps `module` and registers the scheme's hook. A collective call.

    PowerSGD gets one bucket: with more it hangs on gloo. The others get DDP's default layout unless
    `bucket_mb` says otherwise; `auto` then gets the buckets that it chose. `memory` is given to a scheme of
    ours; None: its own. `auto` and `plain` take neither `density` nor `memory`, and `lowbit` no `density`.

    Raises:
        ValueError: an unknown scheme.
    """
    if scheme not in (*SCHEMES, LOW_BIT, PLAIN):
        raise ValueError(f"scheme must be one of {SCHEMES}, got {scheme!r}")
    state = _state(scheme, module, density, memory) if is_ours(scheme) else None
    cap = bucket_mb
    if scheme.startswith("powersgd"):
        cap = 4096
    elif scheme == AUTO and cap is None:
        cap = state.plan.bucket_mb
    options: dict[str, Any] = {} if cap is None else {"bucket_cap_mb": cap}
    # Every rank starts from the same parameters: on a slow network sending them takes longer than the steps.
    model = DistributedDataParallel(module, gradient_as_bucket_view=True, init_sync=False, **options)
    if state is None:
        attach_peer(scheme, model)
    else:
        register(model, state)
    return Attached(model, state)


def parts(scheme: str, density: float, memory: Memory | None = None) -> Parts:
    """Selector, exchange and memory of a name in `OURS`, with or without `MPI_SUFFIX`.

    `memory` None: the scheme's own.
    """
    transport = "mpi" if scheme.endswith(MPI_SUFFIX) else "distributed"
    return make_parts(scheme.removesuffix(MPI_SUFFIX), density, transport, memory=memory)


def _state(scheme: str, module: torch.nn.Module, density: float, memory: Memory | None) -> SparseState:
    if scheme == AUTO:
        return SparseState.auto(module)
    if scheme == PLAIN:
        return SparseState(None, Dense(), ddp_allreduce=True)
    return SparseState(*parts(scheme, density, memory))


def attach_peer(scheme: str, model: DistributedDataParallel) -> None:
    """Registers the hook of a name in PEERS, or of `none`. `dense` is DDP without a hook."""
    if scheme == "none":
        model.register_comm_hook(None, _nothing)
    elif scheme in ("fp16", "bf16"):
        compress = getattr(default_hooks, f"{scheme}_compress_hook")

        # DDP refuses the bf16 hook by its name without NCCL.
        def renamed(state, bucket):  # type: ignore[no-untyped-def]
            return compress(state, bucket)

        model.register_comm_hook(None, renamed)
    elif scheme.startswith("powersgd"):
        state = powerSGD_hook.PowerSGDState(
            process_group=None, matrix_approximation_rank=int(scheme[8:]), start_powerSGD_iter=2
        )
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


def _nothing(state, bucket):  # type: ignore[no-untyped-def]  # register_comm_hook looks at annotations
    future: torch.futures.Future[Any] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future
