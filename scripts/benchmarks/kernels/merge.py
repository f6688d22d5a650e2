"""merge_topk, gTop-k's inner step, beside a copy of its inputs and the same merge by numpy and by torch."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch
from torch import Tensor

from commhooks.native import ops, reference

from .timing import Bench, Call

Pairs = tuple[Tensor, Tensor]


def measure(bench: Bench, k: int, density: float) -> None:
    """Two selections of k pairs.

    Raises:
        AssertionError: merge_topk differs from its reference.
    """
    numel = int(k / density)
    generator = torch.Generator().manual_seed(k)
    a, b = (
        (torch.randn(k, generator=generator), ops.random_indices(7, step, 0, numel, k)) for step in range(2)
    )
    for got, want in zip(ops.merge_topk(*a, *b, k), reference.merge_topk(*a, *b, k), strict=True):
        if not torch.equal(got, want):
            raise AssertionError("merge_topk disagrees with its reference")
    labels = {"kernel": "merge_topk", "data": "gaussian", "numel": numel, "density": density}
    bench.compare(labels, lambda: ops.merge_topk(*a, *b, k), rivals(a, b, k))


def rivals(a: Pairs, b: Pairs, k: int) -> dict[str, Call]:
    """A copy of the inputs, and the same merge by numpy and by torch."""
    parts = [*a, *b]
    copies = [torch.empty_like(part) for part in parts]
    arrays = [part.numpy() for part in parts]

    def memcpy() -> None:
        for part, room in zip(parts, copies, strict=True):
            ctypes.memmove(room.data_ptr(), part.data_ptr(), part.nbytes)

    def by_numpy() -> tuple[np.ndarray[Any, Any], ...]:
        union = np.union1d(arrays[1], arrays[3])
        total = np.zeros(union.size, np.float32)
        total[np.searchsorted(union, arrays[1])] += arrays[0]
        total[np.searchsorted(union, arrays[3])] += arrays[2]
        best = np.sort(np.argpartition(-np.abs(total), k)[:k])
        return total[best], union[best], np.isin(arrays[1], union[best]), np.isin(arrays[3], union[best])

    def by_torch() -> tuple[Tensor, ...]:
        union, places = torch.cat((a[1], b[1])).unique(return_inverse=True)
        total = torch.zeros(union.numel()).index_add_(0, places, torch.cat((a[0], b[0])))
        best = total.abs().topk(k, sorted=False).indices.sort().values
        keep = torch.zeros(union.numel(), dtype=torch.bool).index_fill_(0, best, True)
        return total[best], union[best], keep[places[: a[1].numel()]], keep[places[a[1].numel() :]]

    return {"memcpy": memcpy, "numpy": by_numpy, "torch": by_torch}
