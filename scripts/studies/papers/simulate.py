"""All algorithms of the papers for R repeats of P workers in one process, vectorised.

`checks.py` holds this simulation against the library at small P, sample for sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .problems import Problem

Rate = Callable[[int], float]


@dataclass
class Setup:
    """One run. Steps t count from 0; synchronisation sets hold steps from 1, as the library's do."""

    problem: Problem
    workers: int
    steps: int
    rate: Rate  # learning rate of step t
    batch: int = 1  # b, samples per worker and step
    repeats: int = 1  # R
    seed: int = 0
    sync: Any = None  # a set of steps after which to average; None: never
    momentum: float = 0.0  # beta of the workers
    nesterov: bool = False
    average_momentum: bool = False  # PR-SGD-Momentum
    block_momentum: float | None = None  # mu of M-AVG; 0 is K-AVG
    mixing: tuple[Tensor, ...] = ()  # W, or several that take turns: decentralized
    shards: list[Tensor] | None = None  # rows each worker may draw from; None: all
    start: Tensor | None = None
    initial: Tensor | None = field(default=None, repr=False)  # (R, P, n), instead of start


@dataclass
class State:
    """Points x and velocities u of all workers after ``step`` steps, (R, P, n) each."""

    step: int
    x: Tensor
    u: Tensor
    synchronised: bool

    @property
    def mean(self) -> Tensor:
        """The average over workers, (R, n)."""
        return self.x.mean(dim=1)


def rows_of(setup: Setup) -> Iterator[Tensor]:
    """The samples (R, P, b) of each step, with replacement; the same for any algorithm with this seed."""
    generator = torch.Generator().manual_seed(1000 + setup.seed)
    shape = (setup.repeats, setup.workers, setup.batch)
    while True:
        if setup.shards is None:
            yield torch.randint(setup.problem.samples, shape, generator=generator)
        else:
            drawn = torch.rand(shape, generator=generator)
            rows = [shard[(drawn[:, p] * len(shard)).long()] for p, shard in enumerate(setup.shards)]
            yield torch.stack(rows, dim=1)


def run(setup: Setup) -> Iterator[State]:
    """The states before the first step and after each; tensors are overwritten, so take what you keep."""
    point = setup.problem.start(setup.seed) if setup.start is None else setup.start
    x = (
        point.expand(setup.repeats, setup.workers, -1).clone()
        if setup.initial is None
        else setup.initial.clone()
    )
    u, anchor, velocity = torch.zeros_like(x), x.mean(dim=1), torch.zeros_like(x[:, 0])
    yield State(0, x, u, True)
    for t, rows in zip(range(setup.steps), rows_of(setup), strict=False):
        g = setup.problem.gradient(x, rows)
        if setup.momentum:
            u.mul_(setup.momentum).add_(g)
            g = g + setup.momentum * u if setup.nesterov else u
        x.sub_(g, alpha=setup.rate(t))
        due = setup.sync is not None and (t + 1) in setup.sync
        if setup.mixing:
            w = setup.mixing[t % len(setup.mixing)].T
            x, u = w @ x, w @ u
        elif due:
            mean = x.mean(dim=1)
            if setup.block_momentum is not None:
                velocity.mul_(setup.block_momentum).add_(mean - anchor)
                anchor = anchor + velocity
                mean = anchor
            x = mean[:, None].expand_as(x).clone()
            if setup.average_momentum:
                u = u.mean(dim=1, keepdim=True).expand_as(u).clone()
        yield State(t + 1, x, u, due)


@dataclass
class SparseSetup:
    """M-DSGD: masks per worker, memory, momentum (Algorithm 1 of arXiv:1905.12960)."""

    problem: Problem
    workers: int
    steps: int
    rate: Rate
    keep: int | None  # elements each worker sends; None: all
    mask: str = "topk"  # or "randomk"
    momentum: float = 0.0
    batch: int = 1
    repeats: int = 1
    seed: int = 0
    factor_masking: bool = False
    rescale: bool = False  # learning rate in the memory (eq. 3 and 4)
    start: Tensor | None = None


def run_sparse(setup: SparseSetup) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Yields (step, w (R, n), u (R, P, n), g (R, P, n)); g is the gradient of the step just done."""
    shape = (setup.repeats, setup.workers, setup.problem.numel)
    point = setup.problem.start(setup.seed) if setup.start is None else setup.start
    w = point.expand(setup.repeats, -1).clone()
    u, v = torch.zeros(shape, dtype=w.dtype), torch.zeros(shape, dtype=w.dtype)
    draw = rows_of(Setup(setup.problem, setup.workers, 0, setup.rate, setup.batch, setup.repeats, setup.seed))
    generator = torch.Generator().manual_seed(2000 + setup.seed)
    last = None
    yield 0, w, u, v
    for t, rows in zip(range(setup.steps), draw, strict=False):
        rate = setup.rate(t)
        g = setup.problem.gradient(w[:, None].expand(shape), rows)
        v = setup.momentum * v + g
        c = v + u * (last / rate if setup.rescale and last is not None else 1.0)
        if setup.keep is None:
            mask = torch.ones_like(c)
        else:
            key = c.abs() if setup.mask == "topk" else torch.rand(shape, generator=generator)
            mask = torch.zeros_like(c).scatter_(-1, key.topk(setup.keep, dim=-1).indices, 1.0)
        u = (1 - mask) * c
        if setup.factor_masking:
            v = (1 - mask) * v
        w = w - rate * (mask * c).mean(dim=1)
        last = rate
        yield t + 1, w, u, g


def by_class(labels: Tensor, workers: int) -> list[Tensor]:
    """Rows sorted by label and dealt in blocks: every worker sees its own few classes (non-i.i.d. data)."""
    return list(torch.argsort(labels, stable=True).chunk(workers))
