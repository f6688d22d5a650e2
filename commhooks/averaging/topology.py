"""Topologies for decentralized averaging: which ranks exchange messages, and with which weights.

A topology is one mixing matrix W, or several that take turns. An averaging is ``x_p <- sum_j W[j, p] x_j``
(PR-SGD-Momentum, arXiv:1905.03817, Algorithm 2). The paper leaves W open. Here a static W must be doubly
stochastic and connected, with ``max(|lambda_2|, |lambda_n|) < 1``, and symmetric unless ``directed=True``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .flat import digest_of
from .sync_sets import positive_int

_TOLERANCE = 1e-8  # of row sums and symmetry


@dataclass(frozen=True, eq=False)
class Topology:
    """Mixing matrices that take turns, one per averaging.

    Attributes:
        name: for messages.
        matrices: ``(P, P)`` float64 each. Matrix ``i % len(matrices)`` serves the ``i``-th averaging, from 0.
        spectral_gap: ``1 - max(|lambda_2|, |lambda_n|)`` of a symmetric W. Otherwise ``1 - rho**(1 / m)`` for
            m matrices, where rho is the largest singular value of their product away from consensus. Each
            averaging multiplies the consensus distance by at most ``1 - spectral_gap`` (mean over m).
    """

    name: str
    matrices: tuple[Tensor, ...]
    spectral_gap: float

    @property
    def world_size(self) -> int:
        """Number of ranks P."""
        return int(self.matrices[0].shape[0])

    @cached_property
    def digest(self) -> int:
        """A fingerprint of the matrices, made once."""
        return digest_of(self.matrices)

    def matrix(self, averaging: int) -> Tensor:
        """Returns the matrix W of the ``averaging``-th averaging, from 0."""
        return self.matrices[averaging % len(self.matrices)]

    def neighbours(self, rank: int, averaging: int) -> tuple[list[int], list[tuple[int, float]]]:
        """Returns the ranks it sends to, and those it receives from (and itself) with weights. Ascending."""
        matrix = self.matrix(averaging)
        row, column = matrix[rank].tolist(), matrix[:, rank].tolist()
        sends = [peer for peer, weight in enumerate(row) if weight != 0.0 and peer != rank]
        weights = [(peer, weight) for peer, weight in enumerate(column) if weight != 0.0]
        return sends, weights

    def degree(self, rank: int, averaging: int = 0) -> int:
        """Messages ``rank`` sends in one averaging."""
        return len(self.neighbours(rank, averaging)[0])

    def __repr__(self) -> str:
        return f"{self.name}(world_size={self.world_size}, spectral_gap={self.spectral_gap:.4g})"


def from_matrix(
    matrix: Tensor | Sequence[Sequence[float]] | Any, name: str = "matrix", *, directed: bool = False
) -> Topology:
    """Returns a topology from a mixing matrix, which is checked.

    Args:
        matrix: ``(P, P)``, anything ``torch.as_tensor`` takes. ``W[j, p]`` is the weight of rank j at rank p.
        name: for messages.
        directed: W need not be symmetric. It must still be doubly stochastic, or the mixing would not keep
            the mean. The gap is then computed from singular values.

    Raises:
        ValueError: not square, negative, not doubly stochastic, not connected, not symmetric unless directed,
            or bipartite without self-weights (lambda_n = -1: the ranks would swap for ever). The message
            names the place and the value.
    """
    w = torch.as_tensor(matrix, dtype=torch.float64, device="cpu")
    if directed:
        return time_varying([w], name)
    _check_stochastic(w, name)
    off = (w - w.T).abs()
    if off.max() > _TOLERANCE:
        i, j = divmod(int(off.argmax()), w.shape[0])
        raise ValueError(
            f"{name} must be symmetric, got W[{i}, {j}] = {w[i, j]:g} and W[{j}, {i}] = {w[j, i]:g}; "
            f"directed=True takes a matrix that is not"
        )
    w = (w + w.T) / 2
    return Topology(name, (w,), _symmetric_gap(w, name))


def from_edges(world_size: int, edges: Iterable[tuple[int, int]], name: str = "edges") -> Topology:
    """Returns a topology from an undirected edge list, with Metropolis weights.

    ``W[i, j] = 1 / (1 + max(degree_i, degree_j))`` along edges and the rest on the diagonal: symmetric and
    doubly stochastic for any graph, and each rank needs to know its neighbours' degrees only (Xiao, Boyd, Kim
    2007).

    Args:
        world_size: P.
        edges: pairs of ranks. Order and repetition do not matter.
        name: for messages.

    Raises:
        ValueError: a rank out of range, a loop, or a graph that is not connected.
    """
    positive_int("world_size", world_size)
    neighbours: list[set[int]] = [set() for _ in range(world_size)]
    for i, j in edges:
        if not (0 <= i < world_size and 0 <= j < world_size) or i == j:
            raise ValueError(f"an edge must join two different ranks below {world_size}, got ({i}, {j})")
        neighbours[i].add(j)
        neighbours[j].add(i)
    w = torch.zeros(world_size, world_size, dtype=torch.float64, device="cpu")
    for i, peers in enumerate(neighbours):
        for j in peers:
            w[i, j] = 1.0 / (1 + max(len(peers), len(neighbours[j])))
    w += torch.diag(1.0 - w.sum(dim=1))
    return from_matrix(w, name)


def ring(world_size: int) -> Topology:
    """Returns a ring: each rank and its two neighbours have weight 1/3 each (1/2 with two ranks)."""
    positive_int("world_size", world_size)
    return from_edges(
        world_size, ((i, (i + 1) % world_size) for i in range(world_size) if world_size > 1), "ring"
    )


def torus(world_size: int, rows: int | None = None) -> Topology:
    """Returns a ``rows`` x columns grid that wraps around, by default as square as ``world_size`` allows.

    Raises:
        ValueError: ``rows`` does not divide ``world_size``.
    """
    positive_int("world_size", world_size)
    if rows is None:
        rows = max(r for r in range(1, math.isqrt(world_size) + 1) if world_size % r == 0)
    if positive_int("rows", rows) > world_size or world_size % rows:
        raise ValueError(f"rows must divide world_size = {world_size}, got {rows}")
    columns = world_size // rows
    edges = []
    for r in range(rows):
        for c in range(columns):
            here = r * columns + c
            for there in (((r + 1) % rows) * columns + c, r * columns + (c + 1) % columns):
                if here != there:
                    edges.append((here, there))
    return from_edges(world_size, edges, "torus")


def hypercube(world_size: int) -> Topology:
    """Neighbours differ in one bit of their rank, ``1 / (log2 P + 1)`` each with the rank's own weight.

    Raises:
        ValueError: ``world_size`` is not a power of two.
    """
    positive_int("world_size", world_size)
    if world_size & (world_size - 1):
        raise ValueError(f"world_size must be a power of two for a hypercube, got {world_size}")
    bits = range(world_size.bit_length() - 1)
    return from_edges(world_size, ((i, i ^ (1 << b)) for i in range(world_size) for b in bits), "hypercube")


def exponential(world_size: int) -> Topology:
    """Neighbours at distance +-1, +-2, +-4, ... around the ring: degree about ``2 log2 P``, a large gap."""
    positive_int("world_size", world_size)
    hops = [1 << b for b in range(world_size.bit_length()) if (1 << b) < world_size]
    edges = ((i, (i + hop) % world_size) for i in range(world_size) for hop in hops)
    return from_edges(world_size, edges, "exponential")


def complete(world_size: int) -> Topology:
    """Connects all ranks with all ranks, ``W = 1/P``: PR-SGD-Momentum with a period of 1."""
    positive_int("world_size", world_size)
    return from_matrix(
        torch.full((world_size, world_size), 1.0 / world_size, dtype=torch.float64, device="cpu"), "complete"
    )


def one_peer_exponential(world_size: int) -> Topology:
    """Returns a time-varying topology with one message per averaging: ring distances 1, 2, 4, ... in turn.

    In turn ``j`` each rank sends to the rank ``2**j`` ahead, and averages with the rank ``2**j`` behind. Each
    matrix is doubly stochastic but not symmetric. For P a power of two the ``log2 P`` turns together average
    exactly (spectral_gap 1), otherwise they contract (Assran et al. 2019, Ying et al. 2021).
    """
    positive_int("world_size", world_size)
    hops = [1 << b for b in range(world_size.bit_length()) if (1 << b) < world_size] or [0]
    eye = torch.eye(world_size, dtype=torch.float64, device="cpu")
    return time_varying([(eye + eye.roll(hop, dims=1)) / 2 for hop in hops], "one_peer_exponential")


def time_varying(matrices: Sequence[Any], name: str = "time_varying") -> Topology:
    """Returns a topology of matrices that take turns, each doubly stochastic, and connected together.

    Args:
        matrices: ``(P, P)`` each, symmetric or not, anything ``torch.as_tensor`` takes.
        name: for messages.

    Raises:
        ValueError: no matrix, sizes differ, a matrix is not doubly stochastic, or all turns together do not
            contract.
    """
    turns = tuple(torch.as_tensor(m, dtype=torch.float64, device="cpu") for m in matrices)
    if not turns:
        raise ValueError("matrices must not be empty")
    for i, w in enumerate(turns):
        _check_stochastic(w, f"{name}[{i}]")
        if w.shape != turns[0].shape:
            raise ValueError(f"{name}[{i}] must be {tuple(turns[0].shape)}, got {tuple(w.shape)}")
    size = turns[0].shape[0]
    product = torch.eye(size, dtype=torch.float64, device="cpu")
    for w in turns:
        product = product @ w
    rho = float(torch.linalg.matrix_norm(product - 1.0 / size, ord=2)) if size > 1 else 0.0
    rho = 0.0 if rho < 1e-12 else rho
    if rho >= 1.0 - 1e-10:
        raise ValueError(
            f"{name} must be connected over one cycle, its product keeps a distance factor of {rho:g}"
        )
    return Topology(name, turns, 1.0 - float(rho ** (1.0 / len(turns))))


def _check_stochastic(w: Tensor, name: str) -> None:
    if w.ndim != 2 or w.shape[0] != w.shape[1] or w.shape[0] < 1:
        raise ValueError(f"{name} must be square, got shape {tuple(w.shape)}")
    if not torch.isfinite(w).all():
        raise ValueError(f"{name} must be finite, got {w[~torch.isfinite(w)][0]:g}")
    if w.min() < 0:
        i, j = divmod(int(w.argmin()), w.shape[0])
        raise ValueError(f"{name} must not be negative, got W[{i}, {j}] = {w[i, j]:g}")
    for axis, kind in ((1, "row"), (0, "column")):
        sums = w.sum(dim=axis)
        worst = int((sums - 1).abs().argmax())
        if abs(float(sums[worst]) - 1) > _TOLERANCE:
            raise ValueError(f"{name} must be doubly stochastic, got {kind} {worst} with sum {sums[worst]:g}")


def _symmetric_gap(w: Tensor, name: str) -> float:
    size = w.shape[0]
    if size == 1:
        return 1.0
    values = torch.linalg.eigvalsh(w - 1.0 / size)
    low, high = float(values[0]), float(values[-1])
    if high >= 1.0 - 1e-10:
        raise ValueError(f"{name} must be connected, its second eigenvalue is {high:g}")
    if low <= -1.0 + 1e-10:
        raise ValueError(f"{name} must not be bipartite without self-weights, its last eigenvalue is {low:g}")
    largest = max(abs(low), abs(high))
    return 1.0 - (0.0 if largest < 1e-12 else largest)
