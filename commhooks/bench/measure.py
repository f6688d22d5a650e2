"""One scheme on one model: is its average right, how long is a step, what does a rank send."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from ..ddp.hook import register
from ..ddp.state import SparseState
from ..schemes import SCHEMES, make_parts
from .models import Workload

FOREIGN = ("dense", "fp16", "powersgd")
"""Schemes that are DDP's own or torch's hooks."""
OURS = tuple(name for name in SCHEMES if name != "dense")
"""The schemes of ``commhooks.schemes.SCHEMES`` that compress."""
MOST_STEPS = 100
"""Steps that are timed at most. The least is 3."""
_TOLERATED = 1e-4
_TOLERANCE = {"fp16": 2e-2}
_ONE_BUCKET_MB = 100_000


@dataclass
class Row:
    """Figures of one scheme, equal on all ranks.

    Attributes:
        scheme: its name.
        step_s: seconds of a step: of the slowest rank, median over the steps. None if it was not measured.
        exposed_s: ``step_s`` less that of a step inside ``no_sync``. Below 0 where other work disturbed one
            of the two.
        bytes_sent: bytes that rank 0 sends in a step: counted for ours, by formula for DDP's ring all-reduce.
        steps: how many were timed.
        note: what kept the scheme from being measured, or "".
    """

    scheme: str
    step_s: float | None = None
    exposed_s: float | None = None
    bytes_sent: int | None = None
    steps: int = 0
    note: str = ""

    def beside(self, alone_s: float) -> Row:
        """Returns these figures with ``exposed_s``, for a step without communication of ``alone_s``."""
        return self if self.step_s is None else replace(self, exposed_s=self.step_s - alone_s)


def attach(
    scheme: str, workload: Workload, density: float
) -> tuple[DistributedDataParallel, SparseState | None]:
    """Wraps the workload's model in DDP and registers the scheme's hook; returns the state of one of ours."""
    if scheme == "powersgd":  # over gloo it hangs with more than one bucket
        ddp = DistributedDataParallel(workload.model, bucket_cap_mb=_ONE_BUCKET_MB)
        ddp.register_comm_hook(PowerSGDState(None, 1, start_powerSGD_iter=2), powerSGD_hook)
        return ddp, None
    ddp = DistributedDataParallel(workload.model)
    if scheme == "fp16":
        ddp.register_comm_hook(None, fp16_compress_hook)
    if scheme in FOREIGN:
        return ddp, None
    return ddp, register(ddp, SparseState(*make_parts(scheme, density)))


def check(scheme: str, ddp: DistributedDataParallel, state: SparseState | None, workload: Workload) -> str:
    """Compares one average with the mean gradient; returns what is wrong, or "". A collective call.

    Ours has to hold ``average + mean residual = mean gradient``, and the same bits on all ranks. What owners
    keep in low-bit exchanges counts as residual.
    """
    wanted, got = _mean(_gradient(ddp, workload, synchronise=False)), _gradient(ddp, workload)
    ends = torch.stack([got, -got])
    dist.all_reduce(ends, dist.ReduceOp.MAX)
    if not torch.equal(ends[0], -ends[1]):
        return "the ranks hold different averages"
    if state is not None:
        names = [name for name, p in ddp.module.named_parameters() if p.requires_grad]
        got = got + _mean(torch.cat([part.flatten() for part in _kept(state, names)]))
    error = float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))
    allowed = _TOLERANCE.get(scheme, _TOLERATED)
    return (
        "" if error <= allowed else f"wrong: off by {error:.1e} of the largest element, {allowed:g} allowed"
    )


def check_repeats(ddp: DistributedDataParallel, workload: Workload) -> None:
    """Checks that the loss gives the same gradient twice, which all figures rest on. A collective call.

    Torch's generator is seeded before each, so that dropout and random batches may be drawn from it.

    Raises:
        ValueError: on all ranks, if it does not on one.
    """
    first, second = (_gradient(ddp, workload, synchronise=False) for _ in range(2))
    differ = float((first - second).abs().max() / first.abs().max().clamp(min=1e-30)) > _TOLERATED
    found = torch.tensor([int(differ)], dtype=torch.int64, device="cpu")
    dist.all_reduce(found, dist.ReduceOp.MAX)
    if found.item():
        raise ValueError(
            f"{workload.name} gives another gradient each time, so no average can be checked: draw the batch "
            "once, where the model is made, and not in the function that returns the loss"
        )


def timed(
    ddp: DistributedDataParallel, workload: Workload, seconds: float, synchronise: bool = True
) -> tuple[float, int]:
    """Times forward and backward for about ``seconds``. A collective call.

    Returns:
        The median over the steps of the slowest rank's seconds, and the number of steps.
    """
    _step(ddp, workload, synchronise)
    first = torch.tensor([max(_step(ddp, workload, synchronise), 1e-6)], dtype=torch.float32, device="cpu")
    dist.all_reduce(first, dist.ReduceOp.MAX)
    steps = min(MOST_STEPS, max(3, int(seconds / float(first))))
    taken = torch.tensor(
        [_step(ddp, workload, synchronise) for _ in range(steps)], dtype=torch.float32, device="cpu"
    )
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return statistics.median(taken.tolist()), steps


def bytes_sent(scheme: str, state: SparseState | None, numel: int, ranks: int) -> int | None:
    """Returns the bytes a rank sends in a step; None where they are not known."""
    if state is not None:
        return int(state.stats()["bytes_sent"])
    size = {"dense": 4, "fp16": 2}.get(scheme)
    return None if size is None else round(2 * (ranks - 1) / ranks * size * numel)


def _step(ddp: DistributedDataParallel, workload: Workload, synchronise: bool) -> float:
    dist.barrier()
    begun = time.perf_counter()
    ddp.zero_grad()
    if synchronise:
        workload.loss(ddp).backward()  # type: ignore[no-untyped-call]
    else:
        with ddp.no_sync():
            workload.loss(ddp).backward()  # type: ignore[no-untyped-call]
    return time.perf_counter() - begun


def _gradient(ddp: DistributedDataParallel, workload: Workload, synchronise: bool = True) -> Tensor:
    """Runs a step on the same random numbers as any other one; returns all gradients as one vector."""
    torch.manual_seed(dist.get_rank())
    _step(ddp, workload, synchronise)
    parts: list[Any] = [p for p in ddp.module.parameters() if p.requires_grad]
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parts])


def _kept(state: SparseState, names: list[str]) -> list[Tensor]:
    """What the memory holds of each parameter. What this rank owns counts for all ranks."""
    saved = state.state_dict()
    kept = [saved["residual"][name].clone() for name in names]
    for name, part in zip(names, kept, strict=True):
        for start, owned in saved.get("owned", {}).get(name, {}).items():
            part.view(-1)[start : start + owned.numel()] += owned * dist.get_world_size()
    return kept


def _mean(vector: Tensor) -> Tensor:
    total = vector.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()
