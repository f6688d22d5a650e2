"""write_back, scatter_add and random_indices beside torch's operators."""

from __future__ import annotations

import torch

from commhooks.native import ops

from .timing import Bench


def measure(bench: Bench, numel: int, density: float) -> None:
    """k pairs of `numel` elements.

    Raises:
        AssertionError: write_back differs from torch's operators.
    """
    k = max(1, int(numel * density))
    indices = ops.random_indices(1, 2, 3, numel, k)
    values = torch.randn(k)
    out, dense, grad = torch.empty(numel), torch.zeros(numel), torch.ones(numel)
    long = indices.long()
    labels = {"data": "gaussian", "numel": numel, "density": density}
    ops.write_back(out, values, indices, 0.25, threads=bench.threads)
    if not torch.equal(out, dense.index_add(0, long, values * 0.25)):
        raise AssertionError("write_back disagrees with torch")
    bench.compare(
        {"kernel": "write_back", **labels},
        lambda: ops.write_back(out, values, indices, 0.25, threads=bench.threads),
        {
            "r+=g": lambda: dense.add_(grad),
            "torch": lambda: out.zero_().index_add_(0, long, values, alpha=0.25),
        },
    )
    bench.compare(
        {"kernel": "scatter_add", **labels},
        lambda: ops.scatter_add(dense, values, indices),
        {"torch": lambda: dense.index_add_(0, long, values)},
    )
    bench.compare(
        {"kernel": "random_indices", **labels},
        lambda: ops.random_indices(1, 2, 3, numel, k),
        {"torch": lambda: torch.randperm(numel, dtype=torch.int32)[:k].sort()},
    )
