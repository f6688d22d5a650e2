"""What is compared: how each scheme is attached to a DDP model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

PEERS = ("dense", "fp16", "bf16", "powersgd1", "powersgd2", "powersgd4")
OURS = ("topk", "gtopk", "gtopk-tree", "randomk")
AUTO = "auto"
PLAIN = "plain"
"""What the planner gives for "do not compress": ours without selector and memory."""
MPI_SUFFIX = "-mpi"
SCHEMES = ("none", *PEERS, *OURS, AUTO, *(name + MPI_SUFFIX for name in OURS))
"""`none` communicates nothing; a name of ours alone uses gloo, with `-mpi` MPI; `auto` is what the planner chooses among
them over gloo; the rest is torch's own over gloo."""


@dataclass
class Attached:
    """A DDP model with a scheme on it. `state`: our SparseState, or None."""

    model: DistributedDataParallel
    state: Any


def is_ours(scheme: str) -> bool:
    """Whether the scheme is one of commhooks'."""
    return scheme.removesuffix(MPI_SUFFIX) in (*OURS, AUTO, PLAIN)


def attach(
    scheme: str, module: torch.nn.Module, density: float, bucket_mb: float | None = None, memory: Any = None
) -> Attached:
    """Wraps `module` and registers the scheme's hook. A collective call.

    PowerSGD gets one bucket: with more it hangs on gloo. The others get DDP's default layout unless `bucket_mb` says
    otherwise; `auto` then gets the buckets that it chose. `memory` is given to a scheme of ours; None: plain error
    feedback. `auto` and `plain` take neither `density` nor `memory`.

    Raises:
        ValueError: an unknown scheme.
    """
    from commhooks import register

    if scheme not in (*SCHEMES, PLAIN):
        raise ValueError(f"scheme must be one of {SCHEMES}, got {scheme!r}")
    state = _state(scheme, module, density, memory) if is_ours(scheme) else None
    cap = bucket_mb
    if scheme.startswith("powersgd"):
        cap = 4096
    elif scheme == AUTO and cap is None:
        cap = state.plan.bucket_mb
    options: dict[str, Any] = {} if cap is None else {"bucket_cap_mb": cap}
    # Every rank starts from the same parameters: sending them would take longer than the steps on a slow network.
    model = DistributedDataParallel(module, gradient_as_bucket_view=True, init_sync=False, **options)
    if state is None:
        _attach_peer(scheme, model)
    else:
        register(model, state)
    return Attached(model, state)


def make_state(scheme: str, density: float, memory: Any = None) -> Any:
    """A SparseState for one of our schemes."""
    from commhooks import AllGather, ErrorFeedback, GTopK, RandomK, SharedIndices, SparseState, TopK

    name = scheme.removesuffix(MPI_SUFFIX)
    memory = ErrorFeedback() if memory is None else memory
    transport = "mpi" if scheme.endswith(MPI_SUFFIX) else "distributed"
    if name == "randomk":
        return SparseState(RandomK(density), SharedIndices(transport), memory)
    if name == "topk":
        return SparseState(TopK(density), AllGather(transport), memory)
    algorithm = "tree" if name == "gtopk-tree" else "doubling"
    return SparseState(TopK(density), GTopK(transport, algorithm=algorithm), memory)


def _state(scheme: str, module: torch.nn.Module, density: float, memory: Any) -> Any:
    from commhooks import Dense, SparseState

    if scheme == AUTO:
        return SparseState.auto(module)
    if scheme == PLAIN:
        state = SparseState(None, Dense(), None)
        state.plan = PLAIN  # the hook takes DDP's own way only where a planner said so
        return state
    return make_state(scheme, density, memory)


def _attach_peer(scheme: str, model: DistributedDataParallel) -> None:
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

    if scheme == "none":
        model.register_comm_hook(None, _nothing)
    elif scheme in ("fp16", "bf16"):
        compress = getattr(default_hooks, f"{scheme}_compress_hook")

        def renamed(state, bucket):  # type: ignore[no-untyped-def]  # DDP refuses the bf16 hook by its name without NCCL
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
