"""Every CPU kernel gives the bits of the reference, for every instruction set and number of threads."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace
from typing import Iterator

import kernel_cases as cases
import pytest
import torch

from commhooks.native import abi, ops, reference
from commhooks.native.fused import PAD, Fused

pytestmark = pytest.mark.native


@pytest.fixture(params=cases.ISAS, autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test once per instruction set that this machine has."""
    abi.use_isa(request.param)
    yield request.param
    abi.use_isa(None)


def ks(numel: int) -> list[int]:
    return sorted({0, min(1, numel), numel // 1000, numel // 97, numel // 3, max(numel - 1, 0), numel})


def check_topk(fused: Fused, k: int, threads: int, seed: int = 0) -> int:
    got_fused, want_fused = cases.copy(fused), cases.copy(fused)
    got = ops.select_topk(got_fused, k, seed=seed, threads=threads)
    cases.same_selection(got, got_fused, reference.select_topk(want_fused, k), want_fused)
    return int(got.report[2])


@pytest.mark.parametrize("kind", cases.KINDS)
def test_select_topk(kind: str) -> None:
    for numel in cases.SIZES:
        for k in ks(numel):
            check_topk(cases.fused(kind, numel, numel + k), k, threads=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_select_topk_with_everything(dtype: torch.dtype) -> None:
    options = itertools.product(("gaussian", "bad", "steps"), (0, 1, 5, 40), (False, True), (False, True))
    for i, (kind, segments, velocity, misaligned) in enumerate(options):
        numel = (1009, 20011, 70001)[i % 3]
        fused = cases.fused(
            kind,
            numel,
            i,
            dtype=dtype,
            velocity=velocity,
            scaled=i % 2 == 0,
            segments=segments,
            misaligned=misaligned,
            apart=i % 5 in (1, 2),
            rescaled=i % 5 in (2, 3),
        )
        for k in (0, 1, numel // 100, numel // 3):
            check_topk(fused, k, threads=1 + i % 3)


def test_every_half_is_read_right() -> None:
    """All bit patterns of both half types, NaN and subnormal ones included."""
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        grad = patterns.view(dtype)
        fused = Fused(grad, torch.zeros(grad.numel()))
        check_topk(fused, 3000, threads=1)


def test_threads_do_not_change_a_bit() -> None:
    fused = cases.fused("heavy", 300_007, 3, segments=17)
    for call in (
        lambda f, t: ops.select_topk(f, 3001, threads=t),
        lambda f, t: ops.select_threshold(f, 1.0, 20_000, start=200_000, threads=t),
        lambda f, t: ops.select_indices(f, ops.random_indices(1, 2, 3, 300_007, 5000), threads=t),
    ):
        first_fused = cases.copy(fused)
        first = call(first_fused, 1)
        for threads in (2, 3, 4, 9):
            again_fused = cases.copy(fused)
            cases.same_selection(call(again_fused, threads), again_fused, first, first_fused)


def test_missed_guesses_are_exact() -> None:
    """Data that defeats the sample, and the residual that all paths leave."""
    misses = 0
    for seed in range(3):
        numel = 400_000
        few = torch.zeros(numel)
        # The nonzero elements fill whole pieces, in runs that a sample of 1/128 rarely meets.
        few[seed * 1000 : seed * 1000 + 4000] = torch.randn(4000)
        apart = {"residual_out": torch.empty(numel), "rescale": torch.full((1,), 3.0)} if seed else {}
        misses += check_topk(Fused(few, torch.zeros(numel), **apart), 1000, threads=2, seed=seed)
        tied = torch.full((numel,), 0.25)
        tied[::1000] = 1.0
        memory = torch.full((numel,), 0.125 * (seed > 1))
        misses += check_topk(Fused(tied, memory, **apart), 1000, threads=2, seed=seed)
    assert misses > 0


def test_select_threshold() -> None:
    for kind, numel in itertools.product(cases.KINDS, (0, 1, 257, 4097, 70001)):
        for i, threshold in enumerate((0.0, 1e-3, 1.0, 1e30, float("inf"))):
            options = {"velocity": i % 3 == 0, "apart": i in (0, 3), "rescaled": i in (2, 3)}
            fused = cases.fused(kind, numel, i, segments=4 if i % 2 else 0, **options)
            for k, start in ((0, 0), (numel // 50, numel // 3), (numel, max(numel - 1, 0))):
                got_fused, want_fused = cases.copy(fused), cases.copy(fused)
                got = ops.select_threshold(got_fused, threshold, k, start=start, threads=2)
                want = reference.select_threshold(want_fused, threshold, k, start)
                cases.same_selection(got, got_fused, want, want_fused)


def test_select_indices() -> None:
    for kind, numel in itertools.product(("gaussian", "bad"), (0, 1, 257, 4097, 70001)):
        for i, k in enumerate(ks(numel)):
            options = {"velocity": i % 3 == 0, "apart": i in (1, 2), "rescaled": i in (0, 1)}
            fused = cases.fused(kind, numel, i, segments=5 if i % 2 else 0, **options)
            generator = torch.Generator().manual_seed(i)
            _, indices = cases.sparse(numel, k, k - k // 4, generator, whole=False)
            got_fused, want_fused = cases.copy(fused), cases.copy(fused)
            got = ops.select_indices(got_fused, indices, threads=2)
            cases.same_selection(got, got_fused, reference.select_indices(want_fused, indices), want_fused)


def test_sample_threshold_is_near() -> None:
    fused = cases.fused("gaussian", 500_000, 1, velocity=True, scaled=True)
    before = cases.copy(fused)
    rescaled = cases.fused("gaussian", 500_000, 1, segments=9, rescaled=True, apart=True)
    for k in (500, 5000, 50_000):
        estimate = ops.sample_threshold(rescaled, k)
        # Inactive segments count like active ones.
        each = torch.repeat_interleave(rescaled.rescale, rescaled.segments.diff())
        above = int(((each * rescaled.residual + rescaled.grad).abs() > estimate).sum())
        assert 0.4 * k < above + 1 < 2.5 * k, (k, above)
    for k in (500, 5000, 50_000, 500_000):
        estimate = ops.sample_threshold(fused, k)
        count = reference.select_threshold(cases.copy(fused), estimate, 500_000).report[0].item()
        assert 0.4 * k < count + 1 < 2.5 * k, (k, count)
    cases.same_bits("residual", fused.residual, before.residual)
    assert ops.sample_threshold(Fused(torch.zeros(0), torch.zeros(0)), 0) == 0.0


def test_random_indices() -> None:
    for numel in (0, 1, 2, 3, 4, 5, 16, 17, 100, 1009, 65536, 65537, 2**31 - 2):
        for k in {0, min(numel, 1), min(numel, 3), min(numel, 300), min(numel, 4000)}:
            args = (123456789 + k, 7, 2**63 + 5, numel, k)
            got = ops.random_indices(*args)
            cases.same_bits(f"{numel} {k}", got, reference.random_indices(*args, torch.device("cpu")))
            assert got.unique().numel() == k and (k == 0 or 0 <= int(got[0]) <= int(got[-1]) < numel)


def test_random_indices_known_answer() -> None:
    """Pinned: ranks on different versions must draw the same mask."""
    assert ops.random_indices(1, 2, 3, 1000, 5).tolist() == [410, 469, 699, 872, 915]


def test_random_indices_are_uniform() -> None:
    numel, draws = 50, 4000
    counts = torch.zeros(numel)
    for step in range(draws):
        counts[ops.random_indices(5, step, 1, numel, 5).long()] += 1
    expected = draws * 5 / numel
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 100, chi_square  # 49 degrees of freedom: beyond 5 sigma


def test_merge_topk() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((0, 0), (0, 5), (1, 1), (100, 90), (257, 1), (5000, 5000), (20_000, 333))
    for (size_a, size_b), numel, whole in itertools.product(shapes, (20_003, 200_000), (False, True)):
        for used_a, used_b in ((size_a, size_b), (size_a // 2, size_b), (0, size_b // 3)):
            a = cases.sparse(numel, size_a, used_a, generator, whole)
            b = cases.sparse(numel, size_b, used_b, generator, whole)
            for k in {0, 1, size_a, size_b, size_a + size_b + 3}:
                got, want = ops.merge_topk(*a, *b, k), reference.merge_topk(*a, *b, k)
                for name, x, y in zip(got._fields, got, want, strict=True):
                    cases.same_bits(f"{name} {size_a} {size_b} {k}", x, y)


def test_merge_topk_on_several_threads_and_when_the_sample_misleads() -> None:
    generator = torch.Generator().manual_seed(0)
    a = cases.sparse(300_000, 40_000, 39_000, generator, whole=False)
    b = cases.sparse(300_000, 30_000, 30_000, generator, whole=True)
    for k, threads in itertools.product((1, 10_000, 35_000, 80_000), (1, 2, 3, 5)):
        got, want = ops.merge_topk(*a, *b, k, threads=threads), reference.merge_topk(*a, *b, k)
        for name, x, y in zip(got._fields, got, want, strict=True):
            cases.same_bits(f"{name} {k} {threads}", x, y)
    # What an evenly spaced sample of 512 sees is large, the rest is small, or the other way round.
    values, indices = torch.rand(20_480, generator=generator), torch.arange(20_480, dtype=torch.int32)
    none = torch.empty(0), torch.empty(0, dtype=torch.int32)
    for factor, k in itertools.product((1e-3, 1e3), (100, 400, 600, 10_000, 20_000)):
        misleading = values.clone()
        misleading[::40] *= factor
        got = ops.merge_topk(misleading, indices, *none, k)
        for x, y in zip(got, reference.merge_topk(misleading, indices, *none, k), strict=True):
            cases.same_bits(f"misleading {factor} {k}", x, y)


@pytest.mark.parametrize("kind", cases.POISONED)
def test_select_from_a_memory_with_nan(kind: str) -> None:
    for i, numel in enumerate((1, 63, 1009, 4097, 20_011, 200_003)):
        for k in ks(numel):
            fused = cases.fused(kind, numel, numel + k, velocity=k % 2 == 1, segments=3 * (i % 2))
            got_fused, want_fused = cases.copy(fused), cases.copy(fused)
            got = ops.select_topk(got_fused, k, threads=2)
            want = reference.select_topk(want_fused, k)
            cases.same_but_for_nan(got, got_fused, want, want_fused)
            assert ops.sample_threshold(fused, k) >= 0.0
            # No order among magnitudes is asked for here.
            got_fused, want_fused = cases.copy(fused), cases.copy(fused)
            got = ops.select_threshold(got_fused, 1.0, k, start=numel // 2, threads=2)
            want = reference.select_threshold(want_fused, 1.0, k, numel // 2)
            cases.same_selection(got, got_fused, want, want_fused)
            got_fused, want_fused = cases.copy(fused), cases.copy(fused)
            got = ops.select_indices(got_fused, want.indices, threads=2)
            cases.same_selection(
                got, got_fused, reference.select_indices(want_fused, want.indices), want_fused
            )


@pytest.mark.parametrize("kind", cases.POISONED)
def test_merge_values_with_nan(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for size, numel in ((1, 5), (100, 150), (5000, 20_003), (60_000, 100_000)):
        _, indices_a = cases.sparse(numel, size + 3, size, generator, whole=False)
        _, indices_b = cases.sparse(numel, size, size, generator, whole=False)
        a, b = cases.values(kind, size + 3, generator), cases.values(kind, size, generator)
        a[size:] = 0
        for k in (1, size // 100, size // 3, size, 2 * size + 5):
            got = ops.merge_topk(a, indices_a, b, indices_b, k, threads=2)
            want = reference.merge_topk(a, indices_a, b, indices_b, k)
            cases.same_pairs_but_for_nan(got.values, got.indices, want.values, want.indices)
            for indices, survives in ((indices_a, got.survives_a), (indices_b, got.survives_b)):
                assert torch.equal(survives, reference.contains(indices, got.indices))


def test_contains() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((0, 0), (0, 5), (1, 1), (100, 90), (257, 1), (5000, 5000), (333, 20_000))
    for (size, size_among), numel in itertools.product(shapes, (20_003, 200_000)):
        for used, used_among in ((size, size_among), (size // 2, size_among), (size, 0)):
            wanted = cases.sparse(numel, size, used, generator, whole=False)[1]
            among = cases.sparse(numel, size_among, used_among, generator, whole=False)[1]
            members = set(among.tolist()) - {PAD}
            expected = torch.tensor([i in members for i in wanted.tolist()], dtype=torch.bool)
            assert torch.equal(ops.contains(wanted, among), expected)
            assert torch.equal(reference.contains(wanted, among), expected)
    same = torch.arange(1000, dtype=torch.int32)
    assert ops.contains(same, same).all()


def test_scatter_add_and_write_back() -> None:
    generator = torch.Generator().manual_seed(0)
    for numel in (0, 1, 70, 1009, 70_001, 1_200_007):
        rows = [cases.sparse(numel, numel // 9, numel // 10, generator, whole=False) for _ in range(3)]
        values, indices = (torch.stack(part) for part in zip(*rows, strict=True))
        got, want = torch.randn(2, numel, generator=generator).mul_(0).add_(0.5)
        ops.scatter_add(got, values[0], indices[0], 0.3)
        reference.scatter_add(want, values[:1], indices[:1], 0.3)
        cases.same_bits("scatter_add", got, want)
        for offset, m, threads in ((0, 1, 1), (0, 3, 2), (1, 3, 2)):
            got, want = torch.full((2, numel + offset), 9.0)[:, offset:]
            got = got.contiguous() if offset == 0 else got
            ops.write_back(got, values[:m], indices[:m], 1 / 3, threads=threads)
            reference.write_back(want, values[:m], indices[:m], 1 / 3)
            cases.same_bits("write_back", got, want)


def test_write_back_rounds_halves_like_torch() -> None:
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(0))
    edges = torch.tensor(
        [65504.0, 65519.9, 65520.0, 1e9, 3.39e38, 3.4e38, float("inf"), 1e-8, 2.98e-8, 5.96e-8, -0.0]
    )
    floats = torch.cat((bits.to(torch.int32).view(torch.float32), torch.randn(100_000), edges, -edges))
    indices = torch.arange(floats.numel(), dtype=torch.int32)
    for dtype in (torch.bfloat16, torch.float16):
        got, want = torch.empty(2, floats.numel(), dtype=dtype)
        ops.write_back(got, floats, indices)
        reference.write_back(want, floats[None], indices[None])
        cases.same_bits(str(dtype), got, want)


def test_works_after_a_fork() -> None:
    fused = cases.fused("gaussian", 200_003, 1)
    check_topk(fused, 2000, threads=2)
    want = ops.select_topk(cases.copy(fused), 2000, threads=1)
    child = os.fork()
    if child == 0:
        got = ops.select_topk(fused, 2000, threads=3)
        os._exit(0 if torch.equal(got.indices, want.indices) else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    check_topk(cases.fused("gaussian", 200_003, 2), 2000, threads=2)


def test_padding_constant() -> None:
    assert PAD == 2**31 - 1


def test_large_outputs_apart_from_their_inputs() -> None:
    """From 4 MB on new residuals and velocities are written with streaming stores."""
    numel = (1 << 20) + 77
    for i, (misaligned, segments) in enumerate(itertools.product((False, True), (0, 9))):
        options = {"velocity": i % 2 == 0, "segments": segments, "misaligned": misaligned}
        fused = cases.fused("bad", numel, i, apart=True, rescaled=i == 1, **options)
        before = cases.copy(fused)
        for k in (1000, numel // 3):
            check_topk(fused, k, threads=2)
        calls = (
            lambda ops, f: ops.select_threshold(f, 2.0, 20_000, start=numel // 2),
            lambda ops, f: ops.select_indices(f, torch.arange(0, numel, 97, dtype=torch.int32)),
        )
        for call in calls:
            got_fused, want_fused = cases.copy(fused), cases.copy(fused)
            got = call(ops, got_fused)
            cases.same_selection(got, got_fused, call(reference, want_fused), want_fused)
        cases.same_bits("residual", fused.residual, before.residual)


def test_going_back_is_a_swap() -> None:
    """The memory from before stays bit for bit, and the result is that of the pass in place."""
    fused = cases.fused("gaussian", 70_001, 1, velocity=True, segments=5)
    apart = cases.fused("gaussian", 70_001, 1, velocity=True, segments=5, apart=True)
    kept = cases.copy(apart)
    got, want = ops.select_topk(apart, 700), ops.select_topk(fused, 700)
    for ours, theirs in zip(got, want, strict=True):
        cases.same_bits("output", ours, theirs)
    cases.same_bits("residual", apart.new_residual, fused.residual)
    cases.same_bits("velocity", apart.new_velocity, fused.velocity)
    cases.same_bits("residual from before", apart.residual, kept.residual)
    cases.same_bits("velocity from before", apart.velocity, kept.velocity)


def test_a_rescaled_residual_is_the_one_scaled_before() -> None:
    """Inactive segments are scaled too."""
    rescaled = cases.fused("gaussian", 70_001, 1, velocity=True, segments=6, rescaled=True)
    before = cases.fused("gaussian", 70_001, 1, velocity=True, segments=6)
    for factor, begin, end in zip(rescaled.rescale.tolist(), before.segments, before.segments[1:]):
        before.residual[begin:end] *= factor
    got, want = ops.select_topk(rescaled, 700), ops.select_topk(before, 700)
    cases.same_selection(got, replace(rescaled, rescale=None), want, before)


def test_flags_of_inactive_segments() -> None:
    """One flag per segment and the number of elements in the inactive ones, with the pass."""
    offsets = torch.tensor([0, 0, 10, 20, 20, 30])
    grad = torch.zeros(30)
    grad[:10], grad[12], grad[25] = -0.0, torch.nan, 1e-45
    for call in (
        lambda f: ops.select_topk(f, 3),
        lambda f: ops.select_threshold(f, 0.5, 3),
        lambda f: ops.select_indices(f, torch.empty(0, dtype=torch.int32)),
    ):
        got = call(Fused(grad, torch.ones(30), segments=offsets))
        assert got.active.dtype == torch.bool and got.active.tolist() == [False, False, True, False, True]
        assert got.report[3] == 10
        without = call(Fused(grad, torch.ones(30)))
        assert without.active is None and without.report[3] == 0


def test_rows_of_a_message() -> None:
    """Rows with other words between them, and indices that all rows share."""
    generator = torch.Generator().manual_seed(0)
    numel, k = 70_001, 700
    message = torch.randint(-9, 9, (3, 4 + 2 * k), dtype=torch.int32, generator=generator)
    for row in message:
        values, indices = cases.sparse(numel, k, k - 9, generator, whole=False)
        row[4 : 4 + k], row[4 + k :] = values.view(torch.int32), indices
    values, indices = message[:, 4 : 4 + k].view(torch.float32), message[:, 4 + k :]
    for which in (indices, indices[:1].expand(3, k)):
        got, want = torch.randn(numel, generator=generator), torch.empty(0)
        want = got.clone()
        ops.scatter_add(got, values, which, 0.3)
        reference.scatter_add(want, values.contiguous(), which.contiguous(), 0.3)
        cases.same_bits("scatter_add", got, want)
        ops.write_back(got, values, which, 0.3, threads=2)
        reference.write_back(want, values.contiguous(), which.contiguous(), 0.3)
        cases.same_bits("write_back", got, want)
    for call in (ops.scatter_add, ops.write_back):
        with pytest.raises(ValueError, match="rows of values and indices must be contiguous"):
            call(torch.zeros(numel), values[:, ::2], indices[:, ::2])
        with pytest.raises(ValueError, match="values and .* must not share memory"):
            call(message.view(torch.float32)[-1], values, indices)
