"""Hypothesis fuzz of the kernels against the reference."""

from __future__ import annotations

from typing import Any

import kernel_cases as cases
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from commhooks.native import ops, reference

pytestmark = pytest.mark.native
quick = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

operands = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(cases.KINDS),
        "numel": st.one_of(st.integers(0, 40), st.integers(0, 6000), st.integers(60_000, 90_000)),
        "seed": st.integers(0, 2**31),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        "velocity": st.booleans(),
        "scaled": st.booleans(),
        "segments": st.integers(0, 12),
        "misaligned": st.booleans(),
        "apart": st.booleans(),
        "rescaled": st.booleans(),
    }
)


@quick
@given(operands, st.floats(0, 1), st.integers(1, 4), st.integers(0, 2**64 - 1))
def test_select_topk(options: dict[str, Any], fraction: float, threads: int, seed: int) -> None:
    got_fused = cases.fused(**options)
    want_fused = cases.copy(got_fused)
    k = int(options["numel"] * fraction**4)
    got = ops.select_topk(got_fused, k, seed=seed, threads=threads)
    cases.same_selection(got, got_fused, reference.select_topk(want_fused, k), want_fused)


@quick
@given(
    operands, st.floats(0, 1), st.floats(0, 4, width=32), st.floats(0, 1, exclude_max=True), st.integers(1, 4)
)
def test_select_threshold(
    options: dict[str, Any], fraction: float, threshold: float, begin: float, threads: int
) -> None:
    got_fused = cases.fused(**options)
    want_fused = cases.copy(got_fused)
    numel = options["numel"]
    k, start = int(numel * fraction**2), int(numel * begin)
    got = ops.select_threshold(got_fused, threshold, k, start=start, threads=threads)
    want = reference.select_threshold(want_fused, threshold, k, start)
    cases.same_selection(got, got_fused, want, want_fused)


@quick
@given(
    st.integers(1, 5000),
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 3),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_merge_topk(
    numel: int, of_a: float, of_b: float, of_k: float, padding: int, whole: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    used_a, used_b = int(numel * of_a), int(numel * of_b)
    a = cases.sparse(numel, used_a + padding, used_a, generator, whole)
    b = cases.sparse(numel, used_b + padding, used_b, generator, whole)
    k = int((used_a + used_b + 2) * of_k)
    for x, y in zip(ops.merge_topk(*a, *b, k), reference.merge_topk(*a, *b, k), strict=True):
        cases.same_bits("merge", x, y)


@quick
@given(
    st.integers(0, 3000),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(1, 3),
    st.integers(0, 2**31),
    st.integers(0, 2),
    st.integers(1, 3),
)
def test_low_bit_decode_of_any_bytes(
    numel: int, bits: int, rows: int, seed: int, turns: int, threads: int
) -> None:
    """Bytes that no encoder writes are refused with one text by both, and nothing is written; else one result."""
    generator = torch.Generator().manual_seed(seed)
    size = ops.low_bit_size(numel, bits)
    if turns == 2:
        messages = torch.randint(0, 256, (rows, size), generator=generator).to(torch.uint8)
    else:
        vectors = torch.randn(rows, numel, generator=generator)
        messages = torch.stack([ops.low_bit_encode(x, bits) for x in vectors])
        for _ in range(turns if size else 0):
            at = int(torch.randint(0, rows * size, (), generator=generator))
            messages.view(-1)[at] = int(torch.randint(0, 256, (), generator=generator))
    start = torch.randn(numel, generator=generator)
    outcomes = []
    for implementation in ("library", "reference"):
        out = start.clone()
        with pytest.MonkeyPatch.context() as patch:
            if implementation == "reference":
                patch.setattr(ops, "_implementation", lambda device: reference)
            try:
                ops.low_bit_decode_add(messages, bits, out, threads=threads)
                text = ""
            except ValueError as error:
                text = str(error)
                cases.same_bits("untouched", out, start)
        outcomes.append((text, out))
    assert outcomes[0][0] == outcomes[1][0]
    cases.same_bits("sum", outcomes[0][1], outcomes[1][1])


@quick
@given(st.integers(0, 700), st.integers(0, 700), st.sampled_from([1, 2, 4, 8]), st.integers(-9, 9))
def test_low_bit_decode_of_another_size(numel: int, other: int, bits: int, off: int) -> None:
    """A message of any other size is refused."""
    size = max(ops.low_bit_size(other, bits) + off, 0)
    message = torch.full((size,), 0x22, dtype=torch.uint8)
    out = torch.ones(numel)
    if size == ops.low_bit_size(numel, bits):
        return
    for call in (ops.low_bit_decode, ops.low_bit_decode_add):
        with pytest.raises(ValueError, match=f"for {numel} elements of {bits} bits"):
            call(message, bits, out)
    assert bool((out == 1).all())
