"""Low-bit messages: the format by an oracle in Python numbers, conservation, and what is refused."""

from __future__ import annotations

import struct
from typing import Any, Callable, Iterator

import kernel_cases as cases
import numpy as np
import pytest
import torch
from torch import Tensor

from commhooks.native import abi, ops, reference

BITS = (1, 2, 4, 8)
SIZES = (0, 1, 7, 255, 256, 257, 600)


@pytest.fixture
def torch_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_implementation", lambda device: reference)


@pytest.fixture(params=["library", "reference"])
def implementation(request: pytest.FixtureRequest) -> None:
    if request.param == "reference":
        request.getfixturevalue("torch_operators")


@pytest.fixture(params=cases.ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    abi.use_isa(request.param)
    yield request.param
    abi.use_isa(None)


def to_bfloat16(value: np.float32) -> np.float32:
    """Rounded to bfloat16 by integers, half to even."""
    bits = int(value.view(np.uint32))
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return np.uint32(bits).view(np.float32)


def block_scale(block: np.ndarray, bits: int) -> np.float32:
    """The scale of one block, by the page's formula and one operation at a time."""
    if not np.isfinite(block).all():
        return np.float32("nan")
    with np.errstate(over="ignore"):
        if bits <= 2:
            lanes = [np.float32(0)] * 16
            for i, x in enumerate(block):
                lanes[i % 16] = lanes[i % 16] + abs(x)
            while len(lanes) > 1:
                half = len(lanes) // 2
                lanes = [lanes[j] + lanes[j + half] for j in range(half)]
            scale = lanes[0] / np.float32(len(block))
            if bits == 2:
                scale = np.float32(0.625) * scale
        else:
            scale = max(abs(block)) / np.float32({4: 7, 8: 127}[bits])
    scale = to_bfloat16(scale)
    return np.float32(0) if scale < 2.0**-100 else min(scale, np.float32(2.0**100))


def oracle(x: np.ndarray, bits: int) -> tuple[bytes, np.ndarray]:
    """The message and the decoded values, element by element."""
    scales, number, values = b"", 0, np.empty_like(x)
    for start in range(0, len(x), 256):
        block = x[start : start + 256]
        scale = block_scale(block, bits)
        word = 0x7FC0 if np.isnan(scale) else int(scale.view(np.uint32)) >> 16
        scales += struct.pack("<H", word)
        for i, element in enumerate(block, start):
            if bits == 1:
                code = int(element >= 0)
                level = 1 if code else -1
            elif bits == 2:
                outer = abs(element) >= 2 * scale
                code = (3 if outer else 2) if element >= 0 else (0 if outer else 1)
                level = 2 * code - 3
            else:
                largest = 2 ** (bits - 1) - 1
                level = 0
                if scale > 0:
                    rounded = np.rint(element * (np.float32(1) / scale))
                    level = int(min(max(rounded, -largest), largest))
                code = level + largest + 1
            values[i] = np.float32(level) * scale
            number |= code << (i * bits)
    return scales + number.to_bytes(-(-len(x) * bits // 8), "little"), values


def inputs(numel: int, seed: int) -> list[Tensor]:
    """Float32 vectors that are hard on a scale or a rounding."""
    generator = torch.Generator().manual_seed(seed)
    halves = torch.randint(-14, 15, (numel,), generator=generator) * 0.5
    spread = cases.values("heavy", numel, generator)
    huge = torch.randn(numel, generator=generator) * 1e38
    huge = huge.clamp(-3.4e38, 3.4e38)
    small = torch.randn(numel, generator=generator) * 2.0**-97
    zeros = torch.where(torch.rand(numel, generator=generator) < 0.5, 0.0, -0.0)
    return [
        *(cases.values(kind, numel, generator) for kind in ("gaussian", "sparse", "denormal", "bad", "zero")),
        *(halves, spread, huge, small, zeros),
    ]


@pytest.mark.usefixtures("torch_operators")
@pytest.mark.parametrize("bits", BITS)
def test_the_format(bits: int) -> None:
    for numel in SIZES:
        for x in inputs(numel, numel):
            before = x.clone()
            message = ops.low_bit_encode(x, bits)
            want, values = oracle(x.numpy(), bits)
            assert message.dtype == torch.uint8 and message.numel() == ops.low_bit_size(numel, bits)
            assert bytes(message.numpy()) == want
            cases.same_bits("x", x, before)
            decoded = torch.empty(numel)
            ops.low_bit_decode(message, bits, decoded)
            assert torch.equal(decoded.isnan(), torch.from_numpy(np.isnan(values)))
            expected = torch.from_numpy(values)
            cases.same_bits("decoded", decoded.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.usefixtures("torch_operators")
@pytest.mark.parametrize("bits", BITS)
def test_remainder_and_sum(bits: int) -> None:
    """The remainder is ``x - decoded`` to the bit, also in place; rows are added in order."""
    for numel in SIZES:
        for number, x in enumerate(inputs(numel, numel)):
            remainder, decoded = torch.full((numel,), 9.0), torch.empty(numel)
            out = torch.full((ops.low_bit_size(numel, bits),), 77, dtype=torch.uint8)
            assert ops.low_bit_encode(x, bits, out, remainder, threads=2) is out
            cases.same_bits("message", out, ops.low_bit_encode(x, bits))
            ops.low_bit_decode(out, bits, decoded, threads=2)
            want = (x - decoded).nan_to_num(7.0, 8.0, 9.0)
            cases.same_bits("remainder", remainder.nan_to_num(7.0, 8.0, 9.0), want)
            own = x.clone()
            cases.same_bits("message", ops.low_bit_encode(own, bits, remainder=own), out)
            cases.same_bits("in place", own.nan_to_num(7.0, 8.0, 9.0), want)
            total = torch.randn(numel)
            want = total + decoded
            ops.low_bit_decode_add(out, bits, total)
            cases.same_bits("sum", total.nan_to_num(7.0), want.nan_to_num(7.0))
            if number == 0:
                others = [ops.low_bit_encode(y, bits) for y in inputs(numel, 5)[:3]]
                rows = torch.zeros(4, out.numel() + 3, dtype=torch.uint8)[:, 2:-1]
                for row, message in zip(rows, [out, *others], strict=True):
                    row.copy_(message)
                    ops.low_bit_decode(message, bits, decoded)
                    want = want + decoded
                ops.low_bit_decode_add(out, bits, total)
                want = total.clone()
                for row in rows:
                    ops.low_bit_decode(row, bits, decoded)
                    want = want + decoded
                ops.low_bit_decode_add(rows, bits, total, threads=2)
                cases.same_bits("rows", total, want)
                ops.low_bit_decode_add(rows[:0], bits, total)
                cases.same_bits("no rows", total, want)


def check_kernels(x: Tensor, bits: int, threads: int) -> None:
    """Encodes, decodes and adds with the library and with torch operators: the same bits everywhere."""
    numel, size = x.numel(), ops.low_bit_size(x.numel(), bits)
    want, want_rest = torch.empty(size, dtype=torch.uint8), torch.empty(numel)
    reference.low_bit_encode(x, bits, want, want_rest)
    # The library's arrays begin anywhere, and what follows them stays.
    room = torch.full((size + 4,), 0xA5, dtype=torch.uint8)
    got = room[3:-1]
    before, own = x.clone(), cases.unaligned(x) if threads == 2 else x.clone()
    ops.low_bit_encode(x, bits, got, threads=threads)
    cases.same_bits("x", x, before)
    cases.same_bits("message", got, want)
    rest = torch.empty(numel)
    ops.low_bit_encode(own, bits, got.fill_(0x5A), rest, threads=threads)
    cases.same_bits("message again", got, want)
    cases.same_bits("remainder", rest, want_rest)
    ops.low_bit_encode(own, bits, got.fill_(0x5A), own, threads=threads)
    cases.same_bits("message in place", got, want)
    cases.same_bits("remainder in place", own, want_rest)
    assert room[[0, 1, 2, -1]].tolist() == [0xA5] * 4
    decoded = torch.empty(numel)
    reference.low_bit_decode(want[None], bits, decoded)
    for out in (torch.empty(numel), cases.unaligned(torch.empty(numel))):
        ops.low_bit_decode(got, bits, out, threads=threads)
        cases.same_bits("decoded", out, decoded)
    rows = got.expand(3, size)
    total = torch.linspace(-1, 1, numel)
    want_total = total.clone()
    reference.low_bit_decode_add(rows, bits, want_total)
    ops.low_bit_decode_add(rows, bits, total, threads=threads)
    cases.same_bits("sum", total, want_total)


@pytest.mark.native
@pytest.mark.parametrize("bits", BITS)
def test_kernels(bits: int, isa: str) -> None:
    for numel in (0, 1, 15, 255, 256, 257, 2304, 4097, 140_001):
        # The largest is for several threads.
        for number, x in enumerate(inputs(numel, numel)[: 2 if numel > 5000 else None]):
            check_kernels(x, bits, threads=1 + number % 3 if numel <= 5000 else 3)
    for seed in range(3):
        any_bits = torch.randint(-(2**31), 2**31, (2000,), generator=torch.Generator().manual_seed(seed))
        check_kernels(any_bits.to(torch.int32).view(torch.float32), bits, threads=2)


@pytest.mark.native
def test_large_outputs_and_threads(isa: str) -> None:
    """Streaming stores, and shares that several threads take."""
    x = cases.values("heavy", (1 << 20) + 300, torch.Generator().manual_seed(1))
    for bits, threads in ((1, 2), (4, 3)):
        check_kernels(x, bits, threads)


@pytest.mark.native
def test_kernels_keep_denormals_where_the_caller_flushes_them(isa: str) -> None:
    x = cases.values("denormal", 1000, torch.Generator().manual_seed(1))
    message = ops.low_bit_encode(x, 1, remainder=(want := torch.empty(1000)))
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        rest = torch.empty(1000)
        again = ops.low_bit_encode(x, 1, remainder=rest)
    finally:
        torch.set_flush_denormal(False)
    cases.same_bits("message", again, message)
    cases.same_bits("remainder", rest, want)
    assert bool((rest != 0).any())


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("bits", BITS)
def test_finite_in_finite_out(bits: int) -> None:
    """Sums that overflow and scales out of range lose nothing: value and remainder are finite."""
    for x in (torch.full((300,), 3.4e38), torch.full((300,), -1e-38), inputs(300, 1)[7]):
        rest, decoded = torch.empty(300), torch.empty(300)
        ops.low_bit_decode(ops.low_bit_encode(x, bits, remainder=rest), bits, decoded)
        assert decoded.isfinite().all() and rest.isfinite().all()
        assert torch.allclose(decoded + rest, x, rtol=1e-6, atol=0.0)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("bits", BITS)
def test_what_is_not_sent_remains(bits: int) -> None:
    """Over many rounds with the remainder added: sent and remainder together are all that was put in."""
    x, decoded = torch.randn(1000), torch.empty(1000)
    rest, sent = torch.zeros(1000), torch.zeros(1000, dtype=torch.float64)
    for _ in range(32):
        total = x + rest
        message = ops.low_bit_encode(total, bits, remainder=rest)
        ops.low_bit_decode(message, bits, decoded)
        sent += decoded
    assert float((sent + rest - 32 * x.double()).abs().max()) < 1e-3
    assert float(rest.norm()) < float(x.norm()) * (20 if bits <= 2 else 1)


@pytest.mark.usefixtures("implementation")
def test_hostile_messages_are_refused_with_their_block() -> None:
    for bits in BITS:
        good = torch.stack([ops.low_bit_encode(torch.randn(600) + 0.1, bits) for _ in range(2)])
        for word in (0x8000, 0xBF80, 0x7F80, 0xFF80, 0x0001, 0x0D7F, 0x7181, 0x7F7F):
            bad = good.clone()
            bad[1, 4:6] = torch.tensor([word & 255, word >> 8], dtype=torch.uint8)
            out = torch.ones(600)
            with pytest.raises(ValueError, match="scale of block 2 of message 1 must be"):
                ops.low_bit_decode_add(bad, bits, out)
            with pytest.raises(ValueError, match="scale of block 2 of message 0 must be"):
                ops.low_bit_decode(bad[1], bits, out)
            assert bool((out == 1).all())
        for word in (0x0000, 0x0D80, 0x7180, 0x7FC0, 0xFFFF, 0x7F81):
            fine = good.clone()
            fine[1, 2:4] = torch.tensor([word & 255, word >> 8], dtype=torch.uint8)
            out = torch.ones(600)
            ops.low_bit_decode(fine[1], bits, out)
            assert bool(out[256:512].isnan().all()) == (word in (0x7FC0, 0xFFFF, 0x7F81))
            assert bool(out[:256].isfinite().all()) and bool(out[512:].isfinite().all())
        if bits < 4:
            continue
        for place in (0, 255, 256, 599):
            bad = good.clone()
            at = 6 + place * bits // 8
            bad[0, at] &= 0x0F if bits == 4 and place % 2 else 0xF0 if bits == 4 else 0
            with pytest.raises(ValueError, match=f"block {place // 256} of message 0 must not hold code 0"):
                ops.low_bit_decode_add(bad, bits, torch.ones(600))


@pytest.mark.usefixtures("implementation")
def test_an_odd_number_of_four_bit_codes_ends_in_no_code() -> None:
    """The unused half of the last byte is 0 and no code; the used half may not be 0."""
    message = ops.low_bit_encode(torch.full((5,), -1.0), 4)
    assert int(message[-1]) == 1
    ops.low_bit_decode(message, 4, torch.empty(5))
    message[-1] = 0x10
    with pytest.raises(ValueError, match="block 0 of message 0 must not hold code 0"):
        ops.low_bit_decode(message, 4, torch.empty(5))


def encoded(numel: int = 10, bits: int = 4) -> Tensor:
    return ops.low_bit_encode(torch.ones(numel), bits)


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: ops.low_bit_size(10, 3), ValueError, "bits must be 1, 2, 4 or 8, got 3"),
        (lambda: ops.low_bit_size(10, True), TypeError, "bits must be an int"),
        (lambda: ops.low_bit_size(-1, 4), ValueError, "numel must be in"),
        (lambda: ops.low_bit_size(2**31 - 1, 4), ValueError, "numel must be in"),
        (lambda: ops.low_bit_encode([1.0], 4), TypeError, "x must be a torch.Tensor"),
        (lambda: ops.low_bit_encode(torch.ones(4).double(), 4), TypeError, "x must have dtype"),
        (lambda: ops.low_bit_encode(torch.ones(4)[::2], 4), ValueError, "x must be a contiguous"),
        (lambda: ops.low_bit_encode(torch.ones(4), 16), ValueError, "bits must be"),
        (
            lambda: ops.low_bit_encode(torch.ones(4), 4, torch.zeros(5, dtype=torch.uint8)),
            ValueError,
            r"out must be contiguous with shape \(4,\), got \(5,\)",
        ),
        (
            lambda: ops.low_bit_encode(torch.ones(4), 4, torch.zeros(4, dtype=torch.int8)),
            TypeError,
            "out must have dtype torch.uint8",
        ),
        (
            lambda: ops.low_bit_encode(torch.ones(4), 4, remainder=torch.ones(3)),
            ValueError,
            "remainder must have 4 elements",
        ),
        (lambda: ops.low_bit_encode(torch.ones(4), 4, threads=0), ValueError, "threads must be"),
        (lambda: ops.low_bit_decode(encoded(), 4, torch.ones(11)), ValueError, "messages must have shape"),
        (lambda: ops.low_bit_decode(encoded(), 8, torch.ones(10)), ValueError, "messages must have shape"),
        (
            lambda: ops.low_bit_decode(torch.stack([encoded()] * 2), 4, torch.ones(10)),
            ValueError,
            "message must be one row, got 2 rows",
        ),
        (lambda: ops.low_bit_decode(encoded(), 4, [1.0]), TypeError, "out must be a torch.Tensor"),
        (
            lambda: ops.low_bit_decode(encoded().char(), 4, torch.ones(10)),
            TypeError,
            "messages must have dtype",
        ),
        (
            lambda: ops.low_bit_decode_add(encoded().expand(2, 7).t().contiguous().t(), 4, torch.ones(10)),
            ValueError,
            "rows of messages must be contiguous",
        ),
        (
            lambda: ops.low_bit_decode_add(encoded()[None, None], 4, torch.ones(10)),
            ValueError,
            "messages must have shape",
        ),
    ],
)
def test_wrong_arguments(call: Callable[[], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


def test_shared_memory_is_refused_but_for_the_remainder_in_place() -> None:
    room = torch.ones(300)
    raw = room.view(torch.uint8)
    for call, text in (
        (lambda: ops.low_bit_encode(room, 1, raw[:42]), "x and out must not share"),
        (lambda: ops.low_bit_encode(room[:-1], 1, remainder=room[1:]), "x and remainder must not share"),
        (lambda: ops.low_bit_encode(torch.ones(300), 1, raw[8:50], room), "remainder and out must not share"),
        (lambda: ops.low_bit_decode(raw[:42], 1, room), "messages and out must not share"),
        (lambda: ops.low_bit_decode_add(raw[:42], 1, room), "messages and out must not share"),
    ):
        with pytest.raises(ValueError, match=text):
            call()
    assert bool((room == 1).all())
