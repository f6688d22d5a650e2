"""Every kernel in plain torch operators: the oracle of the tests and the fallback without a library.

The functions run on any device. Only :func:`sample_threshold`, which returns a float, waits for the device by
design. Results are bit-identical to those of the native libraries, except for :func:`sample_threshold`, which
draws another sample. Arguments have been checked by :mod:`commhooks.native.ops`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import checks
from .fused import PAD, Fused, Merged, Selected

_MAGNITUDE_BITS = 0x7FFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF
_MASK32 = 0xFFFFFFFF
_GOLDEN = 0x9E3779B97F4A7C15
_CPU = torch.device("cpu")


def _keys(values: Tensor) -> Tensor:
    """Magnitudes as int64 in the order of ``|value|``, NaN above infinity."""
    return values.view(torch.int32).bitwise_and(_MAGNITUDE_BITS).to(torch.int64)


class _Corrected(NamedTuple):
    """Result of the pass over one gradient.

    Attributes:
        values: float32 ``(n,)``, the corrected gradient.
        mask: bool ``(n,)``, True for elements of active segments. None without segments.
        flags: bool ``(s,)``, the active segments. None without segments.
        nonfinite: int64 scalar, number of elements in active segments that were not finite.
    """

    values: Tensor
    mask: Tensor | None
    flags: Tensor | None
    nonfinite: Tensor


def _active(fused: Fused) -> Tensor | None:
    """Tells, as bool ``(s,)``, the active segments. None without segments."""
    if fused.segments is None:
        return None
    running = torch.cat((fused.segments.new_zeros(1), (fused.grad != 0).to(torch.int64).cumsum(0)))
    return running[fused.segments].diff() > 0


def _each_element(fused: Fused, per_segment: Tensor) -> Tensor:
    """Expands ``per_segment`` ``(s,)`` to ``(n,)``. Without segments it stays ``(1,)``."""
    if fused.segments is None:
        return per_segment
    return torch.repeat_interleave(per_segment, fused.segments.diff(), output_size=fused.grad.numel())


def _correct(fused: Fused) -> _Corrected:
    """Writes the new residual (the full corrected gradient) and the new velocity."""
    factor = torch.tensor(fused.scale, dtype=torch.float32, device=fused.grad.device)
    if fused.scale_tensor is not None:
        factor = factor * fused.scale_tensor.reshape(())
    gradient = fused.grad.to(torch.float32) * factor
    kept = fused.residual
    if fused.rescale is not None:
        kept = _each_element(fused, fused.rescale) * kept
    decayed = torch.zeros_like(gradient) if fused.velocity is None else fused.velocity * fused.momentum
    velocity = gradient if fused.velocity is None else decayed + gradient
    corrected = kept + velocity
    bad = ~corrected.isfinite()
    velocity = torch.where(bad, decayed + 0.0, velocity)
    corrected = torch.where(bad, kept + velocity, corrected)
    flags = _active(fused)
    mask = None if flags is None else _each_element(fused, flags)
    fused.new_residual.copy_(corrected if mask is None else torch.where(mask, corrected, kept))
    if fused.velocity is not None and fused.new_velocity is not None:
        fused.new_velocity.copy_(velocity if mask is None else torch.where(mask, velocity, fused.velocity))
    return _Corrected(corrected, mask, flags, (bad if mask is None else bad & mask).sum())


def _delivered(selected: Selected, out: Selected | None) -> Selected:
    """Copies ``selected`` into ``out`` and returns that. Returns ``selected`` when ``out`` is None."""
    if out is None:
        return selected
    for target, source in zip(out, selected, strict=True):
        if target is not None and source is not None:
            target.copy_(source)
    return out


def _report(count: Tensor, found: _Corrected) -> Tensor:
    """Makes the report of a selection of ``count`` pairs. No guess missed: the reference guesses none."""
    zero = torch.zeros_like(count)
    inactive = zero if found.mask is None else (~found.mask).sum()
    return torch.stack((count, found.nonfinite, zero, inactive))


def _taken(fused: Fused, found: _Corrected, order: Tensor, k: int) -> Selected:
    """Takes out the ``k`` elements with the largest ``order`` (int64 ``(n,)``, where 0 is not eligible)."""
    best = torch.topk(order, k, sorted=False)
    positions = torch.where(best.values > 0, best.indices, PAD).sort().values
    used = positions != PAD
    where = positions.clamp(max=max(order.numel() - 1, 0))
    values = torch.where(used, found.values[where], 0.0)
    _zero(fused.new_residual, where, used)
    return Selected(values, positions.to(torch.int32), _report(used.sum(), found), found.flags)


def _zero(residual: Tensor, where: Tensor, used: Tensor) -> None:
    """Sets ``residual`` to 0 at the indices ``where`` (int64 ``(k,)``) for which ``used`` (bool) is True."""
    taken = torch.zeros(residual.numel(), dtype=torch.bool, device=residual.device)
    # An unused place may have the index of an element that is taken. Accumulating (a logical or) keeps its
    # False from replacing the True.
    taken.index_put_((where,), used, accumulate=True)
    residual.masked_fill_(taken, 0.0)


def select_topk(
    fused: Fused, k: int, seed: int = 0, threads: int | None = None, out: Selected | None = None
) -> Selected:
    """See :func:`commhooks.native.ops.select_topk`."""
    found = _correct(fused)
    keys = _keys(found.values)
    if found.mask is not None:
        keys = torch.where(found.mask, keys, 0)
    position = torch.arange(keys.numel(), dtype=torch.int64, device=keys.device)
    # One int64 key: magnitude in the high bits, reversed index below. Ties thus go to the lower index.
    order = torch.where(keys > 0, (keys << 31) | (PAD - position), 0)
    return _delivered(_taken(fused, found, order, k), out)


def select_threshold(
    fused: Fused,
    threshold: float,
    k: int,
    start: int = 0,
    threads: int | None = None,
    out: Selected | None = None,
) -> Selected:
    """See :func:`commhooks.native.ops.select_threshold`."""
    found = _correct(fused)
    limit = _keys(torch.tensor([threshold], dtype=torch.float32, device=_CPU)).item()
    eligible = _keys(found.values) > limit
    if found.mask is not None:
        eligible &= found.mask
    numel = eligible.numel()
    position = torch.arange(numel, dtype=torch.int64, device=eligible.device)
    turned = (position - start) % max(numel, 1)
    order = torch.where(eligible, numel - turned, 0)
    return _delivered(_taken(fused, found, order, k), out)


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
    kept = fused.residual[where]
    if fused.rescale is not None:
        each = fused.rescale if fused.segments is None else _each_element(fused, fused.rescale)[where]
        kept = each * kept
    corrected = (kept + corrected).abs().nan_to_num(0.0, 0.0, 0.0)
    rank = min(max(round(where.numel() * k / numel), 1), where.numel())
    return float(torch.kthvalue(corrected, where.numel() - rank + 1).values)


def select_indices(
    fused: Fused, indices: Tensor, threads: int | None = None, out: Selected | None = None
) -> Selected:
    """See :func:`commhooks.native.ops.select_indices`."""
    found = _correct(fused)
    count = (indices != PAD).sum()
    if found.values.numel() == 0:
        values = torch.zeros_like(indices, dtype=torch.float32)
    else:
        used, where = _usable(indices, found.values.numel())
        if found.mask is not None:
            used = used & found.mask[where]
        values = torch.where(used, found.values[where], 0.0)
        _zero(fused.new_residual, where, used)
    return _delivered(Selected(values, indices.clone(), _report(count, found), found.flags), out)


def _usable(indices: Tensor, numel: int) -> tuple[Tensor, Tensor]:
    """Tells which indices are in ``[0, numel)``, and the indices as int64 with 0 in place of the others.

    Padding is out of range. On a GPU other indices may be too, since they have not been checked.
    """
    used = (indices >= 0) & (indices < numel)
    return used, torch.where(used, indices, 0).to(torch.int64)


def _mix(x: int) -> int:
    """Applies the splitmix64 finaliser to one 64-bit word."""
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
    """Makes one pass of the six-round Feistel network over int64 indices below ``2**(2 * half_bits)``."""
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
    """See :func:`commhooks.native.ops.random_indices`.

    Computed on the CPU, because the number of passes of cycle-walking is not known in advance.
    """
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
    room: Merged | None = None,
) -> Merged:
    """See :func:`commhooks.native.ops.merge_topk`. ``threads`` has no meaning here."""
    index, order = torch.cat((indices_a, indices_b)).sort(stable=True)
    value = torch.cat((values_a, values_b))[order]
    size = index.numel()
    if size == 0:
        room = Merged.empty(k, 0, 0, index.device) if room is None else room
        room.values.zero_()
        room.indices.fill_(PAD)
        return room
    same = torch.cat((index[1:] == index[:-1], index.new_zeros(1, dtype=torch.bool))) & (index != PAD)
    total = torch.where(same, value + value.roll(-1), value)
    second = torch.cat((same.new_zeros(1), same[:-1]))
    eligible = (index != PAD) & ~second
    # The + 1 ranks an eligible sum of 0 above padding, whose rank is 0.
    rank = ((_keys(total) + 1) << 31) | (PAD - index.to(torch.int64))
    rank = torch.where(eligible, rank, 0)
    best = torch.topk(rank, min(k, size), sorted=False)
    kept = torch.zeros(size, dtype=torch.bool, device=index.device)
    kept[best.indices] = best.values > 0
    place = torch.where(best.values > 0, best.indices, PAD).sort().values
    used = place != PAD
    where = place.clamp(max=size - 1)
    if room is None:
        room = Merged.empty(k, indices_a.numel(), indices_b.numel(), index.device)
    room.values.zero_()
    room.indices.fill_(PAD)
    room.values[: place.numel()] = torch.where(used, total[where], 0.0)
    room.indices[: place.numel()] = torch.where(used, index[where], PAD)
    survives = torch.empty_like(kept)
    survives[order] = kept | (second & kept.roll(1))
    room.survives_a.copy_(survives[: indices_a.numel()])
    room.survives_b.copy_(survives[indices_a.numel() :])
    return room


def contains(wanted: Tensor, among: Tensor) -> Tensor:
    """See :func:`commhooks.native.ops.contains`. GPUs use this too: the CUDA library has no such kernel."""
    if not among.numel():
        return torch.zeros_like(wanted, dtype=torch.bool)
    nearest = among[torch.searchsorted(among, wanted).clamp_(max=among.numel() - 1)]
    return (nearest == wanted) & (wanted != PAD)


def scatter_add(dense: Tensor, values: Tensor, indices: Tensor, scale: float = 1.0) -> None:
    """See :func:`commhooks.native.ops.scatter_add`. ``values`` and ``indices`` have shape ``(m, k)``."""
    if dense.numel() == 0:
        return
    factor = torch.tensor(scale, dtype=torch.float32, device=_CPU)
    for row_values, row_indices in zip(values, indices, strict=True):
        used, where = _usable(row_indices, dense.numel())
        # Adding -0 changes no bit, unlike +0 onto -0, so unused places may point at element 0.
        dense.index_add_(0, where, torch.where(used, row_values * factor, -0.0))


def write_back(
    out: Tensor, values: Tensor, indices: Tensor, scale: float = 1.0, threads: int | None = None
) -> None:
    """See :func:`commhooks.native.ops.write_back`. ``values`` and ``indices`` have shape ``(m, k)``."""
    if out.dtype == torch.float32:
        out.zero_()
        scatter_add(out, values, indices, scale)
        return
    dense = torch.zeros(out.numel(), dtype=torch.float32, device=out.device)
    scatter_add(dense, values, indices, scale)
    limit = torch.finfo(out.dtype).max
    out.copy_(dense.clamp_(-limit, limit))


def low_bit_encode(
    x: Tensor, bits: int, out: Tensor, remainder: Tensor | None = None, threads: int | None = None
) -> None:
    """See :func:`commhooks.native.ops.low_bit_encode`."""
    numel, size = x.numel(), checks.LOW_BIT_BLOCK
    blocks = -(-numel // size)
    padded = x.new_zeros(blocks * size)
    padded[:numel] = x
    padded = padded.view(blocks, size)
    scale = _low_bit_scale(padded, numel, bits)
    codes = _low_bit_codes(padded, scale[:, None], bits)
    # The bits of a code beyond the last element are 0.
    codes.view(-1)[numel:] = 0
    header = scale.to(torch.bfloat16).view(torch.int16)
    # The bits of a NaN depend on who rounds it.
    header = torch.where(scale.isnan(), 0x7FC0, header).to(torch.int16)
    out[: 2 * blocks] = header.view(torch.uint8)
    shift = torch.arange(0, 8, bits, dtype=torch.int32, device=x.device)
    packed = (codes.view(-1, 8 // bits) << shift).sum(1)
    out[2 * blocks :] = packed[: out.numel() - 2 * blocks].to(torch.uint8)
    if remainder is not None:
        values = _low_bit_values(codes, scale[:, None], bits).reshape(-1)[:numel]
        remainder.copy_(x - values)


def _low_bit_scale(blocks: Tensor, numel: int, bits: int) -> Tensor:
    """Returns the scale of each block of ``(m, 256)``, float32 ``(m,)`` with the precision of bfloat16."""
    magnitudes = blocks.abs()
    if bits <= 2:
        # The order of these sums is a part of the format: 16 rows into 16 lanes, then the lanes in halves.
        rows = magnitudes.view(-1, 16, 16)
        lanes = rows[:, 0]
        for row in range(1, 16):
            lanes = lanes + rows[:, row]
        for half in (8, 4, 2, 1):
            lanes = lanes[:, :half] + lanes[:, half : 2 * half]
        count = torch.full_like(lanes[:, 0], checks.LOW_BIT_BLOCK)
        count[-1:] -= -numel % checks.LOW_BIT_BLOCK
        scale = lanes[:, 0] / count
        if bits == 2:
            scale = scale * 0.625
    else:
        # A tensor as divisor: torch multiplies by the reciprocal of a number.
        largest = torch.full_like(blocks[:, 0], 2 ** (bits - 1) - 1)
        scale = magnitudes.amax(1) / largest
    scale = scale.to(torch.bfloat16).to(torch.float32)
    # Within these bounds 127 scales are finite and a reciprocal is no denormal.
    scale = torch.where(scale < 2.0**-100, 0.0, scale).clamp(max=2.0**100)
    return torch.where(magnitudes.isfinite().all(1), scale, torch.nan)


def _low_bit_codes(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Returns the codes of ``x`` ``(m, 256)`` with ``scale`` ``(m, 1)``, int32."""
    if bits == 1:
        return (x >= 0).to(torch.int32)
    if bits == 2:
        outer = (x.abs() >= 2 * scale).to(torch.int32)
        return torch.where(x >= 0, 2 + outer, 1 - outer)
    largest = int(2 ** (bits - 1)) - 1
    level = (x * (torch.ones_like(scale) / scale)).round().clamp(-largest, largest)
    # A block whose scale is 0 or NaN has level 0 everywhere.
    return torch.where(scale > 0, level, 0.0).to(torch.int32) + (largest + 1)


def _low_bit_values(codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Returns the values of ``codes`` (int32), float32: exact products of a level and a scale."""
    level: Tensor = 2 * codes - (2**bits - 1) if bits <= 2 else codes - 2 ** (bits - 1)
    return level.to(torch.float32) * scale


def _low_bit_decoded(message: Tensor, bits: int, numel: int) -> Tensor:
    """Returns the values of one message, float32 ``(n,)``, NaN where no encoder writes the scale or code."""
    blocks = -(-numel // checks.LOW_BIT_BLOCK)
    header = checks.low_bit_scales(message, blocks)
    scale = header.view(torch.bfloat16).to(torch.float32)
    scale = torch.where(checks.low_bit_scale_valid(header), scale, torch.nan)
    shift = torch.arange(0, 8, bits, dtype=torch.int32, device=message.device)
    codes = (message[2 * blocks :, None].to(torch.int32) >> shift) & (2**bits - 1)
    codes = codes.reshape(-1)[:numel]
    each = scale.repeat_interleave(checks.LOW_BIT_BLOCK)[:numel]
    values = _low_bit_values(codes, each, bits)
    return values if bits <= 2 else torch.where(codes == 0, torch.nan, values)


def low_bit_decode(message: Tensor, bits: int, out: Tensor, threads: int | None = None) -> None:
    """See :func:`commhooks.native.ops.low_bit_decode`. ``message`` has shape ``(1, size)``."""
    out.copy_(_low_bit_decoded(message[0], bits, out.numel()))


def low_bit_decode_add(messages: Tensor, bits: int, out: Tensor, threads: int | None = None) -> None:
    """See :func:`commhooks.native.ops.low_bit_decode_add`. ``messages`` has shape ``(rows, size)``."""
    for message in messages:
        out += _low_bit_decoded(message, bits, out.numel())
