"""The algorithms as plain single-process simulations on dense vectors. Nothing of the library is used here.

All P workers live in one loop. Values are float32 and every operation is rounded on its own, so where the papers fix
an order of additions the distributed run must give the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

MASK64 = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def top_k(c: Tensor, k: int, eligible: Tensor | None = None) -> list[int]:
    """Indices of the k largest |c|, ties to the lower index, zeros never; ascending."""
    order = torch.sort(c.abs(), descending=True, stable=True).indices.tolist()
    allowed = [i for i in order if c[i] != 0 and (eligible is None or bool(eligible[i]))]
    return sorted(allowed[:k])


def _mix(x: int) -> int:
    x ^= x >> 30
    x = x * 0xBF58476D1CE4E5B9 & MASK64
    x ^= x >> 27
    x = x * 0x94D049BB133111EB & MASK64
    return x ^ (x >> 31)


def random_k(seed: int, step: int, stream: int, n: int, k: int) -> list[int]:
    """k of n indices without replacement: a six-round Feistel permutation of 0..k-1 with cycle-walking; ascending."""
    key = 0
    for word in (seed, step, stream):
        key = _mix(((key ^ word) + GOLDEN) & MASK64)
    round_keys = [_mix((key + (r + 1) * GOLDEN) & MASK64) & 0xFFFFFFFF for r in range(6)]
    half = 1
    while 4**half < n:
        half += 1
    low = 2**half - 1

    def permuted(i: int) -> int:
        left, right = i >> half, i & low
        for round_key in round_keys:
            x = (right ^ round_key) * 0x85EBCA6B & 0xFFFFFFFF
            x = (x ^ (x >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
            left, right = right, left ^ ((x ^ (x >> 16)) & low)
        return left << half | right

    chosen = []
    for i in range(k):
        i = permuted(i)
        while i >= n:
            i = permuted(i)
        chosen.append(i)
    return sorted(chosen)


@dataclass
class _Node:
    """A partial result of gTop-k: its pairs, and which indices of which worker are part of it."""

    pairs: dict[int, np.float32]
    alive: dict[int, set[int]]


def _merged(a: _Node, b: _Node, k: int) -> _Node:
    total = dict(a.pairs)
    for i, value in b.pairs.items():
        total[i] = total[i] + value if i in total else value
    kept = sorted(total, key=lambda i: (-abs(total[i]), i))[:k]
    pairs = {i: total[i] for i in kept}
    return _Node(pairs, {p: alive & pairs.keys() for p, alive in (a.alive | b.alive).items()})


def gtop_k(selections: list[dict[int, np.float32]], k: int) -> tuple[dict[int, np.float32], list[set[int]]]:
    """Eq. 6 and 7 of the gTop-k paper for any P: ranks beyond the power of two fold in first, then a binary tree.

    Returns:
        The global pairs, and for each worker the indices at which its value contributes to them (gMask).
    """
    world_size = len(selections)
    nodes = [_Node(dict(s), {p: set(s)}) for p, s in enumerate(selections)]
    core = 1
    while 2 * core <= world_size:
        core *= 2
    for p in range(core, world_size):
        nodes[p - core] = _merged(nodes[p - core], nodes[p], k)
    distance = 1
    while distance < core:
        for p in range(0, core, 2 * distance):
            nodes[p] = _merged(nodes[p], nodes[p + distance], k)
        distance *= 2
    root = nodes[0]
    return root.pairs, [root.alive[p] for p in range(world_size)]


@dataclass
class Workers:
    """P workers of M-DSGD's Algorithm 1 with memory, momentum and factor masking, on one flat vector of n elements.

    Attributes:
        scheme: "union" (each worker's top-k, all take part), "gtopk", "shared" (random-k), "union-random", "dense".
        segments: lengths of the parameters; one whose gradient is zero everywhere takes no part on that worker.
    """

    world_size: int
    n: int
    k: int
    scheme: str
    beta: float = 0.0
    factor_masking: bool = False
    seed: int = 0
    stream: int = 0
    segments: tuple[int, ...] = ()
    step_number: int = 0
    u: list[Tensor] = field(default_factory=list)
    v: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.u = [torch.zeros(self.n) for _ in range(self.world_size)]
        self.v = [torch.zeros(self.n) for _ in range(self.world_size)]
        self.segments = self.segments or (self.n,)

    def rescale(self, last_rate: float, rate: float) -> None:
        """Eq. 3 and 4 in gradient units: u <- (eta_{t-1} / eta_t) u."""
        for u in self.u:
            u *= last_rate / rate

    def step(self, gradients: list[Tensor]) -> Tensor:
        """One step; returns the sum over workers of what was sent, (n,) float32."""
        corrected, masks = [], []
        for p, g in enumerate(gradients):
            active = self._active(g)
            v = self.beta * self.v[p] + g
            self.v[p] = torch.where(active, v, self.v[p])
            corrected.append(torch.where(active, self.u[p] + v, self.u[p]))
            masks.append(self._mask(corrected[p], active))
        if self.scheme == "gtopk":
            selections = [{i: c.numpy()[i] for i in m} for c, m in zip(corrected, masks)]
            pairs, masks = gtop_k(selections, self.k)
            total = torch.zeros(self.n)
            for i, value in pairs.items():
                total[i] = float(value)
        else:
            total = torch.zeros(self.n)
            for c, mask in zip(corrected, masks):
                for i in mask:
                    total[i] += c[i]
        for p, c in enumerate(corrected):
            where = sorted(masks[p])
            self.u[p] = c.clone()
            self.u[p][where] = 0.0
            if self.factor_masking and self.scheme != "dense" and self.k < self.n:
                self.v[p][where] = 0.0
        self.step_number += 1
        return total

    def _active(self, g: Tensor) -> Tensor:
        return torch.cat([(part != 0).any().expand(part.numel()) for part in g.split(self.segments)])

    def _mask(self, c: Tensor, active: Tensor) -> set[int]:
        if self.scheme in ("union", "gtopk"):
            return set(top_k(c, self.k, active))
        if self.scheme == "dense":
            return {i for i in range(self.n) if active[i]}
        chosen = random_k(self.seed, self.step_number, self.stream, self.n, self.k)
        return {i for i in chosen if active[i]}
