"""Inputs that are hard on the kernels, and bit-exact comparison with the reference."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from commhooks.native import abi, reference
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
# Two more are not among KINDS: with NaN in the memory itself their payloads decide which of several NaN is taken, and
# payloads are not the same everywhere. See same_but_for_nan.
POISONED = ("poisoned", "mostly poisoned")

_UNDEFINED = torch.tensor(
    # NaN, quiet and signalling, of both signs, up to the largest magnitude that there is; infinities.
    [0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001, -0x400000, 0x7FFFFFFE, 0x7F800000, -0x800000],
    dtype=torch.int32,
)


def usable(isa: str) -> bool:
    """Whether this machine and the library have the instruction set; False without a library."""
    try:
        abi.use_isa(isa)
    except ValueError:
        return False
    abi.use_isa(None)
    return True


#: The instruction sets that can be tested; the marker ``native`` skips the tests without a library.
ISAS = ["scalar", *filter(usable, ("avx2", "avx512", "neon"))]


def values(kind: str, numel: int, generator: torch.Generator) -> Tensor:
    """Float32 ``(numel,)`` of one of ``KINDS`` or ``POISONED``."""
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
    if kind in POISONED:
        where = torch.rand(numel, generator=generator) < (0.01 if kind == "poisoned" else 0.6)
        which = torch.randint(0, _UNDEFINED.numel(), (numel,), generator=generator)
        return torch.where(where, _UNDEFINED[which], gauss.view(torch.int32)).view(torch.float32)
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
    apart: bool = False,
    rescaled: bool = False,
) -> Fused:
    """Operands of the given kind; with ``segments`` some of them have an all-zero gradient.

    A poisoned kind has NaN and infinities in gradient, residual and velocity. With ``apart`` the outputs are other
    tensors, full of NaN; with ``rescaled`` each segment has a factor of the residual.
    """
    generator = torch.Generator().manual_seed(seed)
    grad = values(kind, numel, generator).to(dtype)
    residual = (
        values("zero" if kind in ("zero", "sparse", "equal", "steps") else "gaussian", numel, generator) * 0.3
    )
    if kind in POISONED:
        residual = values(kind, numel, generator)
    offsets = None
    if segments:
        cuts = torch.randint(0, numel + 1, (segments - 1,), generator=generator).sort().values
        offsets = torch.cat((torch.tensor([0]), cuts, torch.tensor([numel])))
        for i in range(0, segments, 3):
            grad[offsets[i] : offsets[i + 1]] = -0.0
    speed = values(kind if kind in POISONED else "gaussian", numel, generator) if velocity else None
    if misaligned:
        grad, residual = unaligned(grad), unaligned(residual)
        speed = None if speed is None else unaligned(speed)
    factors = torch.rand(max(segments, 1), generator=generator) + 0.5
    factors[::4] = 1.0
    return Fused(
        grad,
        residual,
        velocity=speed,
        momentum=0.9 if velocity else 0.0,
        scale=0.125 / 3 if scaled else 1.0,
        scale_tensor=torch.tensor(1.7) if scaled else None,
        segments=offsets,
        residual_out=torch.full_like(residual, torch.nan) if apart else None,
        velocity_out=torch.full_like(speed, torch.nan) if apart and speed is not None else None,
        rescale=factors if rescaled else None,
    )


def copy(fused: Fused) -> Fused:
    """The same operands, with all that is or may be written in memory of its own."""
    names = ("residual", "velocity", "residual_out", "velocity_out")
    mine = {name: getattr(fused, name) for name in names if getattr(fused, name) is not None}
    return replace(fused, **{name: tensor.clone() for name, tensor in mine.items()})


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
    same_bits("report", got.report[[0, 1, 3]], want.report[[0, 1, 3]])
    assert (got.active is None) == (want.active is None)
    if got.active is not None and want.active is not None:
        same_bits("active", got.active, want.active)
    # With outputs of their own the inputs are compared too: both sides must have left them alone.
    for name in ("residual", "velocity", "residual_out", "velocity_out"):
        ours, theirs = getattr(got_fused, name), getattr(want_fused, name)
        if ours is not None:
            same_bits(name, ours, theirs)


def same_but_for_nan(got: Selected, got_fused: Fused, want: Selected, want_fused: Fused) -> None:
    """Asserts what holds whatever the payloads: as many NaN as the reference takes, and else just what it takes."""
    same_bits("report", got.report[:2], want.report[:2])
    same_pairs_but_for_nan(got.values, got.indices, want.values, want.indices)
    nan = got_fused.residual.isnan() | want_fused.residual.isnan()
    for one, one_fused in ((got, got_fused), (want, want_fused)):
        taken = one.indices[one.values.isnan()].long()
        assert not one_fused.residual[taken].any()  # taken out
        nan[taken] = True
    same_bits("residual", got_fused.residual[~nan], want_fused.residual[~nan])
    assert int(got_fused.residual.isnan().sum()) == int(want_fused.residual.isnan().sum())
    if got_fused.velocity is not None and want_fused.velocity is not None:
        same_bits("velocity", got_fused.velocity, want_fused.velocity)


def same_pairs_but_for_nan(
    values: Tensor, indices: Tensor, want_values: Tensor, want_indices: Tensor
) -> None:
    """Asserts as many pairs, ascending and unique, as many NaN among them, and else the same pairs."""
    assert indices.shape == want_indices.shape and values.shape == want_values.shape
    used = indices[indices != PAD]
    assert used.numel() == int((want_indices != PAD).sum())
    assert bool((indices[used.numel() :] == PAD).all()) and not values[used.numel() :].any()
    assert bool((used[1:] > used[:-1]).all()) and (not used.numel() or int(used[0]) >= 0)
    nan, want_nan = values.isnan(), want_values.isnan()
    assert int(nan.sum()) == int(want_nan.sum())
    same_bits("indices", indices[~nan], want_indices[~want_nan])
    same_bits("values", values[~nan], want_values[~want_nan])


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
