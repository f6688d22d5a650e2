"""Checks what the CUDA kernels and CUB give before they are timed. A difference stops the benchmark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from commhooks.native import cuda, ops, reference
from commhooks.native.fused import Fused, Selected

from .cuda_tools import Cub

_CHECKED = 1_000_000  # elements, of which the reference on the CPU makes little work
_PLACES = 100_000


_LOW_BIT_CHECKED = 200_003


def require(same: bool, what: str) -> None:
    """AssertionError unless ``same``; also under ``python -O``."""
    if not same:
        raise AssertionError(what)


def _part(fused: Fused, device: torch.device | str) -> Fused:
    """A copy of the first elements, on ``device``, with a residual that is not zero."""
    numel = min(fused.grad.numel(), _CHECKED)
    part = replace(
        fused,
        grad=fused.grad[:numel].to(device, copy=True),
        residual=fused.grad[:numel].float().roll(1).mul_(0.5).to(device),
    )
    if fused.velocity is not None:
        part = replace(part, velocity=fused.grad[:numel].float().roll(2).to(device))
    if fused.segments is not None:
        part = replace(part, segments=fused.segments.clamp(max=numel).to(device))
    return part


def selection(
    ours: Callable[[Fused], Selected], theirs: Callable[[Fused], Selected], fused: Fused, what: str
) -> None:
    """Compares a selection and what it leaves with the CPU's reference, all bits of the first elements."""
    device, host = _part(fused, fused.grad.device), _part(fused, "cpu")
    got, want = ours(device), theirs(host)
    same = torch.equal(got.indices.cpu(), want.indices) and torch.equal(got.values.cpu(), want.values)
    same = same and torch.equal(device.residual.cpu(), host.residual)
    if device.velocity is not None and host.velocity is not None:
        same = same and torch.equal(device.velocity.cpu(), host.velocity)
    require(same, f"{what} differs from the reference at {host.grad.numel()} elements")


def small(k: int, fused: Fused) -> int:
    """``k`` scaled down to the elements that :func:`selection` looks at."""
    numel = fused.grad.numel()
    return max(1, k * min(numel, _CHECKED) // numel)


def _taken_as_by_torch(values: Tensor, indices: Tensor, residual: Tensor, corrected: Tensor, k: int) -> bool:
    """Whether ``corrected``'s ``k`` largest magnitudes were taken, leaving ``residual``. Ties: any."""
    largest = torch.topk(corrected.abs(), k, sorted=False).values.sort().values
    where = indices.long()
    rest = corrected.index_fill(0, where, 0.0)
    return (
        torch.equal(values.abs().sort().values, largest)
        and torch.equal(corrected[where], values)
        and torch.equal(residual, rest)
    )


def topk_at_full_size(gradient: Tensor, k: int) -> None:
    """select_topk beside torch.topk on all elements, where indices are largest."""
    residual = 0.1 * gradient.roll(1)
    corrected = residual + gradient
    got = cuda.select_topk(Fused(gradient, residual), k)
    same = _taken_as_by_torch(got.values, got.indices, residual, corrected, k)
    require(same and bool((got.indices.diff() > 0).all()), f"select_topk differs from torch.topk, k {k}")


def cub(rival: Cub, gradient: Tensor, k: int) -> None:
    """CUB's result, in the same way: a rival that does something else is none."""
    residual = 0.1 * gradient.roll(1)
    corrected = residual + gradient
    values, indices = rival.run(gradient, residual, k)
    same = _taken_as_by_torch(values, indices, residual, corrected, k)
    require(same, f"CUB differs from torch.topk at {gradient.numel()} elements, k {k}")


def random_indices(numel: int, k: int, device: str) -> None:
    """The bits of the reference, for up to 100,000 places."""
    k = min(k, _PLACES)
    got = cuda.random_indices(1, 2, 3, numel, k, torch.device(device))
    want = reference.random_indices(1, 2, 3, numel, k, torch.device("cpu"))
    require(
        torch.equal(got.cpu(), want), f"random_indices differs from the reference at {numel} elements, k {k}"
    )


def writes(out: Tensor, values: Tensor, indices: Tensor) -> None:
    """scatter_add and write_back beside index_add; ``out`` is overwritten."""
    start = torch.ones_like(out)
    want = start.index_add(0, indices.long(), values * 0.25)
    cuda.scatter_add(start, values[None], indices[None], 0.25)
    require(torch.equal(start, want), f"scatter_add differs from index_add at {out.numel()} elements")
    want = torch.zeros_like(out).index_add_(0, indices.long(), values * 0.25)
    cuda.write_back(out, values[None], indices[None], 0.25)
    require(torch.equal(out, want), f"write_back differs from index_add at {out.numel()} elements")


def merge(lists: tuple[Tensor, Tensor, Tensor, Tensor], k: int) -> None:
    """merge_topk beside the reference on the CPU."""
    want = reference.merge_topk(*(part.cpu() for part in lists), k)
    for got, wanted, name in zip(cuda.merge_topk(*lists, k), want, want._fields, strict=True):
        require(torch.equal(got.cpu(), wanted), f"merge_topk differs from the reference in {name}, k {k}")


def low_bit(x: Tensor, bits: int) -> None:
    """low_bit_encode and low_bit_decode_add beside the reference on the CPU, on the first elements of ``x``."""
    x = x[:_LOW_BIT_CHECKED]
    rest, want_rest, total = torch.empty_like(x), torch.empty(x.numel()), torch.zeros_like(x)
    message = x.new_empty(ops.low_bit_size(x.numel(), bits), dtype=torch.uint8)
    want, want_total = torch.empty(message.numel(), dtype=torch.uint8), torch.zeros(x.numel())
    cuda.low_bit_encode(x, bits, message, rest)
    reference.low_bit_encode(x.cpu(), bits, want, want_rest)
    cuda.low_bit_decode_add(message[None], bits, total)
    reference.low_bit_decode_add(want[None], bits, want_total)
    pairs = ((message, want), (rest, want_rest), (total, want_total))
    same = all(torch.equal(got.cpu(), wanted) for got, wanted in pairs)
    require(same, f"low-bit kernels of {bits} bits differ from the reference")
