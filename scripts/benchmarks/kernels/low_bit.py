"""low_bit_encode and low_bit_decode_add beside one pass that reads and writes a vector."""

from __future__ import annotations

import torch
from torch import Tensor

from commhooks.native import ops, reference

from .timing import Bench, Call

_CHECKED = 1_000_003


def measure(bench: Bench, numel: int) -> None:
    """Messages of `numel` elements in 1, 2, 4 and 8 bits, the remainder in place.

    Raises:
        AssertionError: a kernel differs from its reference.
    """
    x = torch.randn(numel)
    for bits in (1, 2, 4, 8):
        check(x[:_CHECKED], bits, bench.threads)
        _measure(bench, x, bits)


def _measure(bench: Bench, x: Tensor, bits: int) -> None:
    rest, total, other = torch.empty_like(x), torch.zeros_like(x), torch.ones_like(x)
    message = ops.low_bit_encode(x, bits, threads=bench.threads)
    labels = {"data": f"gaussian, {bits} bits", "numel": x.numel(), "density": 1.0}
    one_pass: dict[str, Call] = {"r*=a": lambda: other.mul_(1.0)}
    bench.compare(
        {"kernel": "low_bit_encode", **labels},
        lambda: ops.low_bit_encode(rest, bits, message, rest, threads=bench.threads),
        one_pass,
        # A remainder is no gaussian: each turn begins with x again.
        between=lambda: rest.copy_(x),
    )
    bench.compare(
        {"kernel": "low_bit_decode_add", **labels},
        lambda: ops.low_bit_decode_add(message, bits, total, threads=bench.threads),
        one_pass,
    )


def check(x: Tensor, bits: int, threads: int) -> None:
    """Raises AssertionError unless the kernels give the reference's bits for ``x``."""
    rest, want_rest, total, want_total = torch.zeros(4, x.numel())
    message = ops.low_bit_encode(x, bits, remainder=rest, threads=threads)
    want = torch.empty_like(message)
    reference.low_bit_encode(x, bits, want, want_rest)
    ops.low_bit_decode_add(message, bits, total, threads=threads)
    reference.low_bit_decode_add(want[None], bits, want_total)
    if not (torch.equal(message, want) and torch.equal(rest, want_rest) and torch.equal(total, want_total)):
        raise AssertionError(f"low-bit kernels of {bits} bits disagree with their reference")
