"""Every kernel in plain torch operators: the oracle of the tests and the fallback without a library.

Runs on any device and never waits for one, except in :func:`sample_threshold`. Results are bit-identical to
those of the native libraries. Arguments have been checked by :mod:`commhooks.native.ops`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .fused import PAD, Fused, Merged, Selected

_MAGNITUDE_BITS = 0x7FFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF
_MASK32 = 0xFFFFFFFF
_GOLDEN = 0x9E3779B97F4A7C15
_CPU = torch.device("cpu")


def _keys(values: Tensor) -> Tensor:
    """Magnitudes as int64 that order like |value| (NaN above infinity)."""
    return values.view(torch.int32).bitwise_and(_MAGNITUDE_BITS).to(torch.int64)


def _active(fused: Fused) -> Tensor | None:
    """Bool ``(n,)``: elements of active segments; None when all are active."""
    if fused.segments is None:
        return None
    numel = fused.grad.numel()
    running = torch.cat((fused.segments.new_zeros(1), (fused.grad != 0).to(torch.int64).cumsum(0)))
    ends = running[fused.segments]
    lengths = fused.segments.diff()
    return torch.repeat_interleave(ends.diff() > 0, lengths, output_size=numel)


def _compensate(fused: Fused) -> tuple[Tensor, Tensor | None, Tensor]:
    """Updates residual (to the full corrected gradient) and velocity.

    Returns:
        The corrected gradient, the mask of active elements or None, and the int64 count of non-finite elements.
    """
    factor = torch.tensor(fused.scale, dtype=torch.float32, device=fused.grad.device)
    if fused.scale_tensor is not None:
        factor = factor * fused.scale_tensor.reshape(())
    gradient = fused.grad.to(torch.float32) * factor
    decayed = torch.zeros_like(gradient) if fused.velocity is None else fused.velocity * fused.momentum
    velocity = gradient if fused.velocity is None else decayed + gradient
    corrected = fused.residual + velocity
    bad = ~corrected.isfinite()
    velocity = torch.where(bad, decayed + 0.0, velocity)
    corrected = torch.where(bad, fused.residual + velocity, corrected)
    active = _active(fused)
    if active is None:
        fused.residual.copy_(corrected)
        if fused.velocity is not None:
            fused.velocity.copy_(velocity)
        return corrected, None, bad.sum()
    fused.residual.copy_(torch.where(active, corrected, fused.residual))
    if fused.velocity is not None:
        fused.velocity.copy_(torch.where(active, velocity, fused.velocity))
    return corrected, active, (bad & active).sum()


def _delivered(selected: Selected, out: Selected | None) -> Selected:
    """``selected``, copied into ``out`` where that is given."""
    if out is None:
        return selected
    for target, source in zip(out, selected, strict=True):
        target.copy_(source)
    return out


def _taken(fused: Fused, corrected: Tensor, order: Tensor, k: int, nonfinite: Tensor) -> Selected:
    """Takes out the ``k`` elements of highest positive ``order`` (int64 ``(n,)``, 0: not eligible)."""
    best = torch.topk(order, k, sorted=False)
    positions = torch.where(best.values > 0, best.indices, PAD).sort().values
    used = positions != PAD
    where = positions.clamp(max=max(order.numel() - 1, 0))
    values = torch.where(used, corrected[where], 0.0)
    taken = torch.zeros(order.numel(), dtype=torch.bool, device=order.device)
    # Padding points at the last element; accumulate keeps it from undoing a true entry there.
    taken.index_put_((where,), used, accumulate=True)
    fused.residual.masked_fill_(taken, 0.0)
    report = torch.stack((used.sum(), nonfinite, torch.zeros_like(nonfinite)))
    return Selected(values, positions.to(torch.int32), report)


def select_topk(
    fused: Fused, k: int, seed: int = 0, threads: int | None = None, out: Selected | None = None
) -> Selected:
    """See :func:`commhooks.native.ops.select_topk`."""
    corrected, active, nonfinite = _compensate(fused)
    keys = _keys(corrected)
    if active is not None:
        keys = torch.where(active, keys, 0)
    position = torch.arange(keys.numel(), dtype=torch.int64, device=keys.device)
    # One int64 holds magnitude and, below it, the reversed index: larger first, then the lower index.
    order = torch.where(keys > 0, (keys << 31) | (PAD - position), 0)
    return _delivered(_taken(fused, corrected, order, k, nonfinite), out)


def select_threshold(
    fused: Fused,
    threshold: float,
    k: int,
    start: int = 0,
    threads: int | None = None,
    out: Selected | None = None,
) -> Selected:
    """See :func:`commhooks.native.ops.select_threshold`."""
    corrected, active, nonfinite = _compensate(fused)
    limit = _keys(torch.tensor([threshold], dtype=torch.float32, device=_CPU)).item()
    eligible = _keys(corrected) > limit
    if active is not None:
        eligible &= active
    numel = corrected.numel()
    position = torch.arange(numel, dtype=torch.int64, device=corrected.device)
    turned = (position - start) % max(numel, 1)
    order = torch.where(eligible, numel - turned, 0)
    return _delivered(_taken(fused, corrected, order, k, nonfinite), out)


def sample_threshold(fused: Fused, k: int, seed: int = 0) -> float:
    """See :func:`commhooks.native.ops.sample_threshold`."""
    numel = fused.grad.numel()
    if numel == 0 or k == 0:
        return 0.0
    size = min(numel, max(65536, 64 * (numel // k)))
    if size == numel:
        where = torch.arange(numel, dtype=torch.int64, device=fused.grad.device)
    else:
        generator = torch.Generator(_CPU).manual_seed(seed & _MASK32)
        starts = torch.randint(0, numel - 7, (size // 8,), generator=generator, device=_CPU)
        starts = starts.to(fused.grad.device)
        where = (starts[:, None] + torch.arange(8, dtype=torch.int64, device=starts.device)).reshape(-1)
    factor = fused.scale if fused.scale_tensor is None else fused.scale * fused.scale_tensor
    corrected = fused.grad[where].to(torch.float32) * factor
    if fused.velocity is not None:
        corrected = fused.velocity[where] * fused.momentum + corrected
    corrected = (fused.residual[where] + corrected).abs().nan_to_num(0.0, 0.0, 0.0)
    rank = min(max(round(where.numel() * k / numel), 1), where.numel())
    return float(torch.kthvalue(corrected, where.numel() - rank + 1).values)


def select_indices(
    fused: Fused, indices: Tensor, threads: int | None = None, out: Selected | None = None
) -> Selected:
    """See :func:`commhooks.native.ops.select_indices`."""
    corrected, active, nonfinite = _compensate(fused)
    count = (indices != PAD).sum()
    if corrected.numel() == 0:
        values = torch.zeros_like(indices, dtype=torch.float32)
        return _delivered(Selected(values, indices.clone(), _report(count, nonfinite)), out)
    used, where = _usable(indices, corrected.numel())
    if active is not None:
        used = used & active[where]
    values = torch.where(used, corrected[where], 0.0)
    taken = torch.zeros(corrected.numel(), dtype=torch.bool, device=corrected.device)
    taken.index_put_((where,), used, accumulate=True)
    fused.residual.masked_fill_(taken, 0.0)
    return _delivered(Selected(values, indices.clone(), _report(count, nonfinite)), out)


def _usable(indices: Tensor, numel: int) -> tuple[Tensor, Tensor]:
    """Which indices are in ``[0, numel)``, and the indices as int64 with 0 where they are not.

    Padding is not. On a device whose indices nobody has looked at, others are left out with it.
    """
    used = (indices >= 0) & (indices < numel)
    return used, torch.where(used, indices, 0).to(torch.int64)


def _report(count: Tensor, nonfinite: Tensor) -> Tensor:
    return torch.stack((count, nonfinite, torch.zeros_like(count)))


def _mix(x: int) -> int:
    """The splitmix64 finaliser on one 64-bit word."""
    x ^= x >> 30
    x = x * 0xBF58476D1CE4E5B9 & _MASK64
    x ^= x >> 27
    x = x * 0x94D049BB133111EB & _MASK64
    return x ^ (x >> 31)


def _round_keys(seed: int, step: int, stream: int) -> list[int]:
    key = 0
    for field in (seed, step, stream):
        key = _mix(((key ^ (field & _MASK64)) + _GOLDEN) & _MASK64)
    return [_mix((key + (r + 1) * _GOLDEN) & _MASK64) & _MASK32 for r in range(6)]


def _permuted(index: Tensor, keys: list[int], half_bits: int) -> Tensor:
    """One pass of the six-round Feistel network over int64 indices below ``2**(2 * half_bits)``."""
    mask = (1 << half_bits) - 1
    left, right = index >> half_bits, index & mask
    for key in keys:
        x = right ^ key
        x = x * 0x85EBCA6B & _MASK32
        x = x ^ (x >> 13)
        x = x * 0xC2B2AE35 & _MASK32
        x = x ^ (x >> 16)
        left, right = right, left ^ (x & mask)
    return (left << half_bits) | right


def random_indices(seed: int, step: int, stream: int, numel: int, k: int, device: torch.device) -> Tensor:
    """See :func:`commhooks.native.ops.random_indices`. Computed on the CPU: cycle-walking has no fixed length."""
    half_bits = 1
    while 1 << (2 * half_bits) < numel:
        half_bits += 1
    keys = _round_keys(seed, step, stream)
    index = _permuted(torch.arange(k, dtype=torch.int64, device=_CPU), keys, half_bits)
    outside = (index >= numel).nonzero().reshape(-1)
    while outside.numel():
        walked = _permuted(index[outside], keys, half_bits)
        index[outside] = walked
        outside = outside[walked >= numel]
    return index.sort().values.to(torch.int32).to(device)


def merge_topk(
    values_a: Tensor,
    indices_a: Tensor,
    values_b: Tensor,
    indices_b: Tensor,
    k: int,
    threads: int | None = None,
) -> Merged:
    """See :func:`commhooks.native.ops.merge_topk`."""
    index, order = torch.cat((indices_a, indices_b)).sort(stable=True)
    value = torch.cat((values_a, values_b))[order]
    size = index.numel()
    if size == 0:
        empty = indices_a.new_zeros(0, dtype=torch.bool)
        return Merged(
            values_a.new_zeros(k), torch.full_like(indices_a.new_empty(k), PAD), empty, empty.clone()
        )
    same = torch.cat((index[1:] == index[:-1], index.new_zeros(1, dtype=torch.bool))) & (index != PAD)
    total = torch.where(same, value + value.roll(-1), value)
    second = torch.cat((same.new_zeros(1), same[:-1]))
    eligible = (index != PAD) & ~second
    # Eligible zeros rank above padding: hence the + 1.
    rank = ((_keys(total) + 1) << 31) | (PAD - index.to(torch.int64))
    rank = torch.where(eligible, rank, 0)
    best = torch.topk(rank, min(k, size), sorted=False)
    kept = torch.zeros(size, dtype=torch.bool, device=index.device)
    kept[best.indices] = best.values > 0
    place = torch.where(best.values > 0, best.indices, PAD).sort().values
    used = place != PAD
    where = place.clamp(max=size - 1)
    values = torch.zeros(k, dtype=torch.float32, device=index.device)
    indices = torch.full((k,), PAD, dtype=torch.int32, device=index.device)
    values[: place.numel()] = torch.where(used, total[where], 0.0)
    indices[: place.numel()] = torch.where(used, index[where], PAD)
    survives = torch.empty_like(kept)
    survives[order] = kept | (second & kept.roll(1))
    return Merged(
        values, indices, survives[: indices_a.numel()].clone(), survives[indices_a.numel() :].clone()
    )


def contains(wanted: Tensor, among: Tensor) -> Tensor:
    """See :func:`commhooks.native.ops.contains`; for any device."""
    if not among.numel():
        return torch.zeros_like(wanted, dtype=torch.bool)
    nearest = among[torch.searchsorted(among, wanted).clamp_(max=among.numel() - 1)]
    return (nearest == wanted) & (wanted != PAD)


def scatter_add(dense: Tensor, values: Tensor, indices: Tensor, scale: float = 1.0) -> None:
    """See :func:`commhooks.native.ops.scatter_add`."""
    if dense.numel() == 0:
        return
    used, where = _usable(indices, dense.numel())
    scaled = values * torch.tensor(scale, dtype=torch.float32, device=_CPU)
    # Adding -0 changes no bit, unlike +0 onto -0, so padding may point at element 0.
    dense.index_add_(0, where, torch.where(used, scaled, -0.0))


def write_back(
    out: Tensor, values: Tensor, indices: Tensor, scale: float = 1.0, threads: int | None = None
) -> None:
    """See :func:`commhooks.native.ops.write_back`; ``values`` and ``indices`` have shape ``(m, k)``."""
    if out.dtype == torch.float32:
        out.zero_()
        for row_values, row_indices in zip(values, indices, strict=True):
            scatter_add(out, row_values, row_indices, scale)
        return
    dense = torch.zeros(out.numel(), dtype=torch.float32, device=out.device)
    for row_values, row_indices in zip(values, indices, strict=True):
        scatter_add(dense, row_values, row_indices, scale)
    limit = torch.finfo(out.dtype).max
    out.copy_(dense.clamp_(-limit, limit))
