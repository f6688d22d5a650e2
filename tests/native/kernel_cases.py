"""Inputs that are hard on the kernels, and bit-exact comparison with the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from commhooks.native import reference
from commhooks.native.fused import PAD, Fused, Selected

SIZES = (0, 1, 2, 7, 16, 63, 257, 1009, 4096, 4097, 6007, 20011, 70001)
KINDS = (
    "gaussian",
    "heavy",
    "equal",
    "zero",
    "sparse",
    "ascending",
    "descending",
    "cluster",
    "denormal",
    "steps",
    "bad",
)


def values(kind: str, numel: int, generator: torch.Generator) -> Tensor:
    """Float32 ``(numel,)`` of one of ``KINDS``."""
    gauss = torch.randn(numel, generator=generator)
    if kind == "heavy":
        return gauss * torch.exp(4 * torch.randn(numel, generator=generator))
    if kind == "equal":
        return torch.full((numel,), -0.5)
    if kind == "zero":
        return torch.zeros(numel)
    if kind == "sparse":
        return gauss * (torch.rand(numel, generator=generator) < 0.003)
    if kind == "ascending":
        return gauss.abs().sort().values
    if kind == "descending":
        return gauss.abs().sort(descending=True).values
    if kind == "cluster":
        # Everything large in one run of 1.5 % that a sample of pieces mostly overlooks or over-represents.
        gauss[: numel // 64] *= 1e4
        return gauss
    if kind == "denormal":
        return gauss * 1e-41
    if kind == "steps":
        return (gauss * 3).round()
    if kind == "bad":
        for place, bad in ((3, float("nan")), (5, float("inf")), (7, float("-inf"))):
            gauss[numel // place :: 997] = bad
        return gauss
    return gauss


def unaligned(tensor: Tensor) -> Tensor:
    """A copy that begins one element after the start of its memory."""
    room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    room[1:] = tensor
    return room[1:]


def fused(
    kind: str,
    numel: int,
    seed: int,
    *,
    dtype: torch.dtype = torch.float32,
    velocity: bool = False,
    scaled: bool = False,
    segments: int = 0,
    misaligned: bool = False,
) -> Fused:
    """Operands of the given kind; with ``segments`` some of them have an all-zero gradient."""
    generator = torch.Generator().manual_seed(seed)
    grad = values(kind, numel, generator).to(dtype)
    residual = (
        values("zero" if kind in ("zero", "sparse", "equal", "steps") else "gaussian", numel, generator) * 0.3
    )
    offsets = None
    if segments:
        cuts = torch.randint(0, numel + 1, (segments - 1,), generator=generator).sort().values
        offsets = torch.cat((torch.tensor([0]), cuts, torch.tensor([numel])))
        for i in range(0, segments, 3):
            grad[offsets[i] : offsets[i + 1]] = -0.0
    speed = values("gaussian", numel, generator) if velocity else None
    if misaligned:
        grad, residual = unaligned(grad), unaligned(residual)
        speed = None if speed is None else unaligned(speed)
    return Fused(
        grad,
        residual,
        velocity=speed,
        momentum=0.9 if velocity else 0.0,
        scale=0.125 / 3 if scaled else 1.0,
        scale_tensor=torch.tensor(1.7) if scaled else None,
        segments=offsets,
    )


def copy(fused: Fused) -> Fused:
    """The same operands in memory of their own."""
    return Fused(
        fused.grad,
        fused.residual.clone(),
        None if fused.velocity is None else fused.velocity.clone(),
        fused.momentum,
        fused.scale,
        fused.scale_tensor,
        fused.segments,
    )


def same_bits(name: str, got: Tensor, want: Tensor) -> None:
    """Asserts equal shapes, dtypes and bits (NaN payloads aside)."""
    assert got.shape == want.shape and got.dtype == want.dtype, name
    if got.dtype.is_floating_point:
        bits = {4: torch.int32, 2: torch.int16}[got.element_size()]
        equal = (got.view(bits) == want.view(bits)) | (got.isnan() & want.isnan())
    else:
        equal = got == want
    wrong = (~equal).nonzero().reshape(-1)
    assert not wrong.numel(), (
        f"{name}: {wrong.numel()} differ, first at {wrong[0]}: {got[wrong[0]]}, {want[wrong[0]]}"
    )


def same_selection(got: Selected, got_fused: Fused, want: Selected, want_fused: Fused) -> None:
    """Asserts that a kernel did what the reference did."""
    same_bits("indices", got.indices, want.indices)
    same_bits("values", got.values, want.values)
    same_bits("report", got.report[:2], want.report[:2])
    same_bits("residual", got_fused.residual, want_fused.residual)
    if got_fused.velocity is not None and want_fused.velocity is not None:
        same_bits("velocity", got_fused.velocity, want_fused.velocity)


def sparse(
    numel: int, size: int, used: int, generator: torch.Generator, whole: bool
) -> tuple[Tensor, Tensor]:
    """A sparse gradient of ``size`` places, ``used`` of them not padding; small whole numbers make ties and zeros."""
    indices = torch.full((size,), PAD, dtype=torch.int32)
    indices[:used] = reference.random_indices(int(torch.randint(1 << 30, (), generator=generator)), 0, 0, numel, used, torch.device("cpu"))  # fmt: skip
    vals = torch.randn(size, generator=generator)
    if whole:
        vals = vals.mul(2).round()
    vals[used:] = 0
    return vals, indices
