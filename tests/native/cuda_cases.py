"""Checks of the CUDA kernels against the reference, for whatever runs them: a GPU, or the emulator on the CPU.

Each ``check_*`` takes the device of the tensors and compares ``commhooks.native.cuda`` with
``commhooks.native.reference`` on the CPU, bit for bit (NaN equals NaN).
"""

from __future__ import annotations

import kernel_cases
import torch
from torch import Tensor

from commhooks.gradient.sparse_grad import HEADER_WORDS, places
from commhooks.native import checks, cuda, reference
from commhooks.native.fused import PAD, Fused, Merged, Selected

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DATA = (
    "gaussian",
    "heavy",
    "equal",
    "zero",
    "few",
    "ties",
    "denormal",
    "nonfinite",
    "ascending",
    "descending",
    "clustered",
    "poisoned",
)


def make_data(kind: str, numel: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Gradient and residual, float32 ``(numel,)``, on the CPU."""
    noise = torch.randn(numel, generator=generator)
    residual = 0.5 * torch.randn(numel, generator=generator)
    nothing = torch.zeros(numel)
    if kind == "heavy":
        return noise / torch.rand(numel, generator=generator).clamp_min(1e-6), residual
    if kind == "equal":
        return torch.full((numel,), -1.5), nothing
    if kind == "zero":
        return nothing, nothing.clone()
    if kind == "few":
        return noise * (torch.rand(numel, generator=generator) < 0.004), nothing
    if kind == "ties":
        return (2 * noise).round(), (residual * 2).round()
    if kind == "denormal":
        return noise * 1e-41, residual * 1e-42
    if kind == "nonfinite":
        bad = torch.tensor([float("nan"), float("inf"), -float("inf")])
        where = torch.rand(numel, generator=generator) < 0.01
        return torch.where(where, bad[torch.arange(numel) % 3], noise), residual
    if kind == "ascending":
        return torch.linspace(0.0, 1.0, numel), nothing
    if kind == "descending":
        return torch.linspace(1.0, 0.0, numel), nothing
    if kind == "clustered":  # all that is large stands in one place: a sample by pieces rarely meets it
        noise[: max(numel // 200, 1)] *= 1000.0
        return noise, residual
    if kind == "poisoned":
        residual[:: max(numel // 3, 1)] = float("inf")
        return noise, residual
    return noise, residual


def make_segments(numel: int, grad: Tensor, generator: torch.Generator) -> Tensor:
    """Offsets ``(s + 1,)`` with empty, tiny and long segments; zeroes the gradient of about every third one."""
    cuts = torch.randint(0, numel + 1, (7,), generator=generator).tolist()
    cuts += cuts[:2] + [min(1, numel), min(2, numel)]
    offsets = [0, *sorted(cuts), numel]
    for number, (begin, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
        if number % 3 == 1:
            grad[begin:end] = 0.0 if number % 2 else -0.0
    return torch.tensor(offsets, dtype=torch.int64)


def make_fused(kind: str, numel: int, dtype: torch.dtype, seed: int, *, options: int = 0) -> Fused:
    """A case on the CPU; bits of ``options``: velocity, segments, a scale on the device, unaligned memory, outputs
    apart from inputs, factors of the residual."""
    generator = torch.Generator().manual_seed(seed)
    grad, residual = make_data(kind, numel, generator)
    velocity = torch.randn(numel, generator=generator) if options & 1 else None
    segments = make_segments(numel, grad, generator) if options & 2 else None
    scale = torch.tensor([0.37]) if options & 4 else None
    if options & 8:
        residual = torch.cat((torch.zeros(1), residual))[1:]
        grad = torch.cat((torch.zeros(3), grad))[3:]
    return Fused(
        grad=grad.to(dtype)
        if not options & 8
        else torch.cat((torch.zeros(3, dtype=dtype), grad.to(dtype)))[3:],
        residual=residual,
        velocity=velocity,
        momentum=0.9 if options & 1 else 0.0,
        scale=1.25 if options & 4 else 1.0,
        scale_tensor=scale,
        segments=segments,
        residual_out=torch.full_like(residual, torch.nan) if options & 16 else None,
        velocity_out=None if velocity is None or not options & 16 else torch.full_like(velocity, torch.nan),
        rescale=_factors(segments, generator) if options & 32 else None,
    )


def _factors(segments: Tensor | None, generator: torch.Generator) -> Tensor:
    """A factor of the residual for each segment, some of them 1."""
    factors = torch.rand(1 if segments is None else segments.numel() - 1, generator=generator) + 0.5
    factors[1::3] = 1.0
    return factors


def _moved(tensor: Tensor | None, device: str, offset: int = 0) -> Tensor | None:
    """A copy on ``device``, ``offset`` elements behind an aligned address."""
    if tensor is None:
        return None
    room = torch.zeros(tensor.numel() + offset, dtype=tensor.dtype, device=device)
    room[offset:].copy_(tensor)
    return room[offset:]


def on_device(fused: Fused, device: str, unaligned: bool = False) -> Fused:
    """A copy of all operands on ``device``."""
    grad = _moved(fused.grad, device, 3 if unaligned else 0)
    residual = _moved(fused.residual, device, 1 if unaligned else 0)
    assert grad is not None and residual is not None
    return Fused(
        grad=grad,
        residual=residual,
        velocity=_moved(fused.velocity, device),
        momentum=fused.momentum,
        scale=fused.scale,
        scale_tensor=_moved(fused.scale_tensor, device),
        segments=_moved(fused.segments, device),
        residual_out=_moved(fused.residual_out, device, 1 if unaligned else 0),
        velocity_out=_moved(fused.velocity_out, device),
        rescale=_moved(fused.rescale, device),
    )


def same_bits(ours: Tensor, theirs: Tensor, what: str) -> None:
    """Raises unless both are bit-identical (on any devices); NaN equals NaN, and -0 differs from 0."""
    ours, theirs = ours.cpu(), theirs.cpu()
    if ours.is_floating_point():
        both_nan = ours.isnan() & theirs.isnan()
        signs_differ = (ours.signbit() != theirs.signbit()) & ~both_nan
        wrong = ((ours != theirs) | signs_differ) & ~both_nan
    else:
        wrong = ours != theirs
    count = int(wrong.sum())
    if count or ours.shape != theirs.shape:
        first = int(wrong.reshape(-1).nonzero()[0])
        a, b = ours.reshape(-1)[first].item(), theirs.reshape(-1)[first].item()
        raise AssertionError(
            f"{what}: {count} of {ours.numel()} differ, first at {first}: {a!r} is not {b!r}"
        )


def same_selection(ours: Selected, theirs: Selected, mine: Fused, reference_side: Fused, what: str) -> None:
    """Compares results, report (without misses) and what was left behind."""
    where = torch.tensor([0, 1, 3])
    same_bits(ours.report.cpu()[where], theirs.report.cpu()[where], f"{what}: report")
    assert (ours.active is None) == (theirs.active is None), what
    if ours.active is not None and theirs.active is not None:
        same_bits(ours.active, theirs.active, f"{what}: active")
    same_bits(ours.indices, theirs.indices, f"{what}: indices")
    same_bits(ours.values, theirs.values, f"{what}: values")
    for name in ("residual", "velocity", "residual_out", "velocity_out"):
        mine_now, theirs_now = getattr(mine, name), getattr(reference_side, name)
        if mine_now is not None:
            same_bits(mine_now, theirs_now, f"{what}: {name}")


def check_select_topk(
    device: str, fused: Fused, k: int, what: str, *, unaligned: bool = False, seed: int = 0
) -> int:
    """Returns the number of misses, for those who want some."""
    mine, theirs = on_device(fused, device, unaligned), on_device(fused, "cpu")
    ours = cuda.select_topk(mine, k, seed)
    expected = reference.select_topk(theirs, k)
    same_selection(ours, expected, mine, theirs, f"select_topk {what}")
    return int(ours.report[2])


def check_select_with_nan(
    device: str, numel: int, k: int, kind: str, *, velocity: bool, segments: int
) -> None:
    """NaN in the memory itself: a GPU gives them another payload, and so may take others of them; see kernel_cases."""
    fused = kernel_cases.fused(kind, numel, numel + k, velocity=velocity, segments=segments)
    mine, theirs = on_device(fused, device), on_device(fused, "cpu")
    ours = Selected(*(None if part is None else part.cpu() for part in cuda.select_topk(mine, k, 1)))
    kernel_cases.same_but_for_nan(ours, on_device(mine, "cpu"), reference.select_topk(theirs, k), theirs)


def check_merge_with_nan(device: str, numel: int, size: int, k: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(size + k)
    _, indices_a = kernel_cases.sparse(numel, size + 3, size, generator, whole=False)
    _, indices_b = kernel_cases.sparse(numel, size, size, generator, whole=False)
    a, b = (kernel_cases.values(kind, indices.numel(), generator) for indices in (indices_a, indices_b))
    a[size:] = 0
    inputs = (a, indices_a, b, indices_b)
    ours = [part.cpu() for part in cuda.merge_topk(*(tensor.to(device) for tensor in inputs), k)]
    expected = reference.merge_topk(*inputs, k)
    kernel_cases.same_pairs_but_for_nan(ours[0], ours[1], expected.values, expected.indices)
    for indices, survives in ((indices_a, ours[2]), (indices_b, ours[3])):
        same_bits(
            survives,
            reference.contains(indices, ours[1]),
            f"survivors of a merge with NaN, size {size}, k {k}",
        )


def check_select_threshold(
    device: str, fused: Fused, threshold: float, k: int, start: int, what: str
) -> None:
    mine, theirs = on_device(fused, device), on_device(fused, "cpu")
    ours = cuda.select_threshold(mine, threshold, k, start)
    expected = reference.select_threshold(theirs, threshold, k, start)
    same_selection(ours, expected, mine, theirs, f"select_threshold {what}")


def check_select_indices(device: str, fused: Fused, indices: Tensor, what: str) -> None:
    mine, theirs = on_device(fused, device), on_device(fused, "cpu")
    ours = cuda.select_indices(mine, indices.to(device))
    expected = reference.select_indices(theirs, indices)
    same_selection(ours, expected, mine, theirs, f"select_indices {what}")


def check_sample_threshold(device: str, numel: int, k: int) -> None:
    """The estimate selects about k; nothing is touched."""
    fused = make_fused("gaussian", numel, torch.float32, 3)
    mine = on_device(fused, device)
    estimate = cuda.sample_threshold(mine, k, 5)
    same_bits(mine.residual, fused.residual, "sample_threshold: residual")
    above = int(((fused.grad + fused.residual).abs() > estimate).sum())
    if not k / 2 <= above <= 2 * k:
        raise AssertionError(f"sample_threshold: {above} of {numel} lie above the estimate for k = {k}")


def check_random_indices(device: str, numel: int, k: int) -> None:
    for seed, step, stream in ((0, 0, 0), (1, 2, 3), (-1, 2**40, 2**64 - 1)):
        ours = cuda.random_indices(seed, step, stream, numel, k, torch.device(device))
        expected = reference.random_indices(seed, step, stream, numel, k, torch.device("cpu"))
        same_bits(ours, expected, f"random_indices {numel} {k} {(seed, step, stream)}")


def make_pairs(numel: int, k: int, pads: int, seed: int, ties: bool) -> tuple[Tensor, Tensor]:
    """A sparse gradient with ``k`` entries and ``pads`` unused places."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randperm(numel, generator=generator)[:k].sort().values.to(torch.int32)
    values = torch.randn(k, generator=generator)
    if ties:
        values = values.round()
    return (
        torch.cat((values, torch.zeros(pads))),
        torch.cat((indices, torch.full((pads,), PAD, dtype=torch.int32))),
    )


def check_merge_topk(
    device: str, numel: int, sizes: tuple[int, int], pads: tuple[int, int], k: int, ties: bool
) -> None:
    a, b = (make_pairs(numel, sizes[i], pads[i], 7 + i, ties) for i in range(2))
    what = f"merge_topk of {sizes} + {pads} below {numel}, k = {k}, ties {ties}"
    for values_b in (b[0], -b[0]):
        inputs = (*a, values_b, b[1])
        ours = cuda.merge_topk(*(tensor.to(device) for tensor in inputs), k)
        expected = reference.merge_topk(*inputs, k)
        for name in ours._fields:
            same_bits(getattr(ours, name), getattr(expected, name), f"{what}: {name}")
    cancelled = cuda.merge_topk(*(t.to(device) for t in (*a, -a[0], a[1])), k)
    expected = reference.merge_topk(*a, -a[0], a[1], k)
    for name in cancelled._fields:
        same_bits(getattr(cancelled, name), getattr(expected, name), f"{what}, cancelled: {name}")


def check_scatter_add(device: str, numel: int, k: int, pads: int, scale: float) -> None:
    values, indices = make_pairs(numel, k, pads, 11, False)
    dense = torch.randn(numel, generator=torch.Generator().manual_seed(1))
    dense[::2] = -0.0
    ours = dense.to(device, copy=True)
    cuda.scatter_add(ours, values.to(device)[None], indices.to(device)[None], scale)
    reference.scatter_add(dense, values[None], indices[None], scale)
    same_bits(ours, dense, f"scatter_add {numel} {k} {pads}")


def check_write_back(
    device: str, dtype: torch.dtype, numel: int, rows: int, k: int, pads: int, scale: float
) -> None:
    pairs = [make_pairs(numel, k, pads, 20 + row, False) for row in range(rows)]
    values = torch.stack([pair[0] for pair in pairs])
    indices = torch.stack([pair[1] for pair in pairs])
    if k > 3:
        values[0, :4] = torch.tensor([1e38, -float("inf"), float("nan"), -1e-30])
    ours = torch.full((numel,), 7.0, dtype=dtype, device=device)
    expected = torch.full((numel,), 7.0, dtype=dtype)
    cuda.write_back(ours, values.to(device), indices.to(device), scale)
    reference.write_back(expected, values, indices, scale)
    same_bits(ours, expected, f"write_back {dtype} {numel} {rows} {k} {pads}")


def check_messages(device: str, numel: int, k: int, ranks: int) -> None:
    """As an exchange uses them: pairs selected and merged straight into messages, sums over rows of messages.

    With an odd k the values in a message begin at no 8-byte address.
    """
    what = f"messages of {k} pairs from {ranks} ranks, numel {numel}"
    messages = torch.full((ranks + 1, HEADER_WORDS + 2 * k), -7, dtype=torch.int32, device=device)
    expected: list[tuple[Tensor, Tensor]] = []
    for rank in range(ranks):
        fused = make_fused("ties", numel, torch.float32, rank, options=2)
        mine, theirs = on_device(fused, device), on_device(fused, "cpu")
        out = Selected.empty(mine, k, *places(messages[rank]))
        ours, wanted = cuda.select_topk(mine, k, rank, out=out), reference.select_topk(theirs, k)
        assert ours.values.data_ptr() == messages[rank, HEADER_WORDS + k :].data_ptr(), what
        same_selection(ours, wanted, mine, theirs, f"{what}: selection of rank {rank}")
        expected.append((wanted.values, wanted.indices))
    indices = messages[:ranks, HEADER_WORDS : HEADER_WORDS + k]
    values = messages[:ranks, HEADER_WORDS + k :].view(torch.float32)
    rows = torch.stack([v for v, _ in expected]), torch.stack([i for _, i in expected])
    for call, oracle in ((cuda.write_back, reference.write_back), (cuda.scatter_add, reference.scatter_add)):
        got, want = torch.ones(numel, device=device), torch.ones(numel)
        call(got, values, indices, 0.3)
        oracle(want, *rows, 0.3)
        same_bits(got, want, f"{what}: {oracle.__name__}")
    if ranks > 1:
        into = places(messages[ranks])
        merged = Merged.empty(k, k, k, messages.device, *into)
        cuda.merge_topk(values[0], indices[0], values[1], indices[1], k, result=merged)
        wanted_sum = reference.merge_topk(*expected[0], *expected[1], k)
        for name in wanted_sum._fields:
            same_bits(getattr(merged, name), getattr(wanted_sum, name), f"{what}: merge, {name}")
    assert bool((messages[:, :HEADER_WORDS] == -7).all()), f"{what}: a header was written"


def check_low_bit(device: str, x: Tensor, bits: int, rows: int, what: str) -> None:
    """Encodes ``x``, and decodes messages one byte of which an encoder may not have written."""
    numel = x.numel()
    size = checks.low_bit_size(numel, bits)
    want, want_rest = torch.empty(size, dtype=torch.uint8), torch.empty(numel)
    reference.low_bit_encode(x, bits, want, want_rest)
    given = x.to(device)
    room = torch.full((size + 2,), 0xA5, dtype=torch.uint8, device=device)
    message, rest = room[1:-1], torch.empty(numel, device=device)
    cuda.low_bit_encode(given, bits, message)
    same_bits(message, want, f"{what}: message")
    cuda.low_bit_encode(given, bits, message.fill_(0x5A), rest)
    same_bits(message, want, f"{what}: message again")
    same_bits(rest, want_rest, f"{what}: remainder")
    same_bits(given, x, f"{what}: input")
    cuda.low_bit_encode(given, bits, message.fill_(0x5A), given)
    same_bits(message, want, f"{what}: message in place")
    same_bits(given, want_rest, f"{what}: remainder in place")
    assert room[[0, -1]].tolist() == [0xA5, 0xA5], f"{what}: written outside"
    many = want.repeat(rows, 1)
    if size:
        many[-1, (numel * 7) % size] = numel % 256
    got, expected = torch.empty(numel, device=device), torch.empty(numel)
    cuda.low_bit_decode(many[-1:].to(device), bits, got)
    reference.low_bit_decode(many[-1:], bits, expected)
    same_bits(got, expected, f"{what}: decoded")
    expected = torch.linspace(-1, 1, numel)
    got = expected.to(device)
    apart = torch.zeros(rows, size + 3, dtype=torch.uint8, device=device)[:, 2:-1].copy_(many)
    cuda.low_bit_decode_add(apart, bits, got)
    reference.low_bit_decode_add(many, bits, expected)
    same_bits(got, expected, f"{what}: sum")
