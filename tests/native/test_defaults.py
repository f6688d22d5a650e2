"""Kernels under another default dtype and device: every tensor made inside names both."""

from __future__ import annotations

import contextlib
from typing import Iterator

import kernel_cases as cases
import pytest
import torch
from torch import Tensor

from commhooks.native import ops
from commhooks.native.fused import Fused


@contextlib.contextmanager
def defaults(kind: str) -> Iterator[None]:
    """Another default dtype, or a default device without memory."""
    if kind == "meta":
        with torch.device("meta"):
            yield
        return
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def results() -> list[Tensor]:
    """What every kernel returns or writes, for fixed inputs."""
    with torch.device("cpu"):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        fused = cases.fused("gaussian", 70_001, 3, velocity=True, scaled=True, segments=5)
        generator = torch.Generator().manual_seed(1)
        a, b = (cases.sparse(70_001, 700, 690, generator, whole=True) for _ in range(2))
        dense = torch.randn(70_001, generator=generator)
        halves = dense.to(torch.bfloat16)
        torch.set_default_dtype(before)
    found: list[Tensor] = []
    for select in (
        lambda f: ops.select_topk(f, 700, seed=1),
        lambda f: ops.select_threshold(f, 1.0, 700, start=40_000),
        lambda f: ops.select_indices(f, a[1]),
    ):
        operands = cases.copy(fused)
        found += [*select(operands), operands.residual]
        assert operands.velocity is not None
        found.append(operands.velocity)
    empty = Fused(fused.grad[:0], fused.residual[:0])
    found += ops.select_indices(empty, a[1][:0])[:3]
    found += ops.merge_topk(*a, *b, 700)
    found += ops.merge_topk(a[0][:0], a[1][:0], b[0][:0], b[1][:0], 2)
    found += [ops.contains(a[1], b[1]), ops.random_indices(1, 2, 3, 70_001, 5)]
    ops.scatter_add(dense, *a, 0.3)
    found.append(dense.clone())
    ops.write_back(dense, torch.stack((a[0], b[0])), torch.stack((a[1], b[1])), 1 / 3)
    ops.write_back(halves, *a, 1 / 3)
    estimate = ops.sample_threshold(fused, 700, seed=4)
    return [*found, dense, halves, torch.tensor(estimate, dtype=torch.float32, device="cpu")]


@pytest.mark.parametrize("implementation", ["library", "reference"])
@pytest.mark.parametrize("kind", ["float64", "meta"])
def test_the_same_bits_under_other_defaults(
    kind: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if implementation == "reference":
        monkeypatch.setattr(ops, "_implementation", lambda device: ops.reference)
    want = results()
    with defaults(kind):
        got = results()
    for number, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        cases.same_bits(f"output {number}", ours, theirs)
