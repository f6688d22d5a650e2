"""Properties over random P, n, k, ties, zeros, segments and dtypes: mass is conserved, all ranks get the same bits."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import ALL_SCHEMES, assert_same_bits, integers, run_steps

from commhooks import ErrorFeedback

LIMITS = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
HALF_LIMITS = settings(LIMITS, max_examples=30)


@st.composite
def problems(draw, largest_world=17):
    """A world size, a scheme, a density, segment lengths, and gradients for some steps; the integers are small, so
    ties, zeros, cancelling sums and k above the number of nonzeros are common."""
    world_size = draw(st.integers(1, largest_world))
    segments = tuple(draw(st.lists(st.integers(1, 20), min_size=1, max_size=4)))
    n = sum(segments)
    density = draw(st.integers(1, n)) / n
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    largest = draw(st.sampled_from((1, 3, 1000)))
    share_of_zeros = draw(st.sampled_from((0.0, 0.5, 0.95)))
    steps = []
    for _ in range(draw(st.integers(1, 3))):
        ranks = []
        for _ in range(world_size):
            g = torch.randint(-largest, largest + 1, (n,), generator=generator).float()
            g[torch.rand(n, generator=generator) < share_of_zeros] = 0.0
            for part in g.split(segments):
                if torch.rand((), generator=generator) < 0.25:
                    part.zero_()
            ranks.append(g)
        steps.append(ranks)
    return world_size, draw(st.sampled_from(sorted(ALL_SCHEMES))), density, segments, steps


def corrected_before(gradients, residuals, velocities, beta, segments):
    """Each rank's corrected gradient (float64), and its velocity before factor masking."""
    corrected, new = [], []
    for g, u, v in zip(gradients, residuals, velocities, strict=True):
        active = torch.cat([(part != 0).any().expand(part.numel()) for part in g.split(segments)])
        new.append(torch.where(active, beta * v + g, v))
        corrected.append(torch.where(active, u + new[-1], u).double())
    return corrected, new


def check_conservation(seen, steps, segments, beta, tolerance, share=1):
    """``sum_p residual_p + share * update = sum_p corrected_p`` per element after every step, ``share`` = P for averages."""
    n = steps[0][0].numel()
    residuals = [torch.zeros(n) for _ in steps[0]]
    velocities = [torch.zeros(n) for _ in steps[0]]
    for gradients, ranks in zip(steps, seen, strict=True):
        corrected, _ = corrected_before([g.float() for g in gradients], residuals, velocities, beta, segments)
        expected = torch.stack(corrected).sum(0)
        have = torch.stack([r.residual.double() for r in ranks]).sum(0) + share * ranks[0].output.double()
        largest = torch.stack(corrected).abs().sum(0).clamp(min=1e-30)
        assert bool(((have - expected).abs() <= tolerance * largest).all()), (have - expected).abs().max()
        residuals = [r.residual for r in ranks]
        velocities = [r.velocity if r.velocity is not None else torch.zeros(n) for r in ranks]
        for rank in ranks:
            assert_same_bits(rank.output, ranks[0].output)


@LIMITS
@given(problems())
def test_integer_mass_is_conserved_to_the_last_bit(problem):
    world_size, scheme, density, segments, steps = problem
    seen = run_steps(world_size, scheme, density, steps, segments)
    check_conservation(seen, steps, segments, 0.0, tolerance=0.0)


@LIMITS
@given(problems(largest_world=9), st.booleans())
def test_with_momentum_and_masking_too(problem, masking):
    world_size, scheme, density, segments, steps = problem
    steps = [[g * 1024.0 for g in ranks] for ranks in steps]
    memory = lambda: ErrorFeedback(0.5, factor_masking=masking)  # noqa: E731
    seen = run_steps(world_size, scheme, density, steps, segments, memory)
    check_conservation(seen, steps, segments, 0.5, tolerance=0.0)


@LIMITS
@given(problems(), st.integers(0, 2**32))
def test_real_mass_is_conserved_to_rounding(problem, seed):
    world_size, scheme, density, segments, steps = problem
    generator = torch.Generator().manual_seed(seed)
    steps = [[g * torch.randn(g.numel(), generator=generator) for g in ranks] for ranks in steps]
    seen = run_steps(world_size, scheme, density, steps, segments, average=True)
    check_conservation(seen, steps, segments, 0.0, tolerance=1e-6, share=world_size)


@HALF_LIMITS
@given(
    problems(largest_world=9),
    st.sampled_from((torch.bfloat16, torch.float16)),
    st.sampled_from((1e-3, 1.0, 60.0)),
    st.booleans(),
)
def test_half_precision_keeps_what_rounding_and_overflow_take(problem, dtype, size, average):
    """Real numbers in 16 bits: sums round, and float16 overflows beyond 65504 (the sum of many times 60 * 1000)."""
    world_size, scheme, density, segments, steps = problem
    generator = torch.Generator().manual_seed(world_size)
    steps = [
        [
            (g * size * (1 + torch.rand(g.numel(), generator=generator) / 16)).clamp(-65504, 65504).to(dtype)
            for g in r
        ]
        for r in steps
    ]
    seen = run_steps(world_size, scheme, density, steps, segments, average=average)
    assert all(bool(rank.output.isfinite().all()) for ranks in seen for rank in ranks)
    check_conservation(seen, steps, segments, 0.0, tolerance=1e-6, share=world_size if average else 1)


@LIMITS
@given(problems(largest_world=9), st.booleans())
def test_the_dense_crossover_conserves_too(problem, average):
    world_size, scheme, density, segments, steps = problem
    steps = [[g * world_size for g in ranks] for ranks in steps] if average else steps
    seen = run_steps(world_size, scheme, density, steps, segments, average=average, dense_crossover=True)
    check_conservation(
        seen, steps, segments, 0.0, tolerance=1e-6 if average else 0.0, share=world_size if average else 1
    )


def test_float16_overflow_is_clamped_and_the_rest_comes_later():
    gradients = [[torch.tensor([60000.0, 1.0], dtype=torch.float16)] * 4] + [[torch.zeros(2).half()] * 4] * 4
    gradients = [[g.clone() for g in ranks] for ranks in gradients]
    for ranks in gradients[1:]:
        for g in ranks:
            g[1] = 2**-24  # something, so that the parameter takes part
    seen = run_steps(4, "union", 0.5, gradients)
    outputs = [float(ranks[0].output[0]) for ranks in seen]
    assert outputs[0] == 65504.0 and sum(outputs) == pytest.approx(240000.0, rel=1e-6)


def test_a_rank_whose_parameter_has_no_gradient_keeps_its_residual():
    gradients = [
        [torch.tensor([4.0, 3.0, 0.0]), torch.tensor([4.0, 3.0, 0.0])],
        [torch.tensor([0.0, 0.0, 5.0]), torch.tensor([0.0, 1.0, 0.0])],
    ]
    for scheme in ("union", "gtopk", "gtopk-tree"):
        seen = run_steps(2, scheme, 1 / 3, gradients, segments=(2, 1))
        assert seen[0][0].output.tolist() == [8.0, 0.0, 0.0]
        assert seen[1][0].residual[:2].tolist() == [0.0, 3.0], scheme


@pytest.mark.parametrize("scheme", ["gtopk", "gtopk-tree"])
def test_gtopk_among_67_ranks(scheme):
    """Studies run at P = 64 and more: three ranks fold into the 64 that merge; mass and equal bits over three steps."""
    generator = torch.Generator().manual_seed(67)
    steps = [[integers(generator, 200) for _ in range(67)] for _ in range(3)]
    seen = run_steps(67, scheme, 0.05, steps)
    assert all(ranks[0].output.count_nonzero() == 10 for ranks in seen)
    check_conservation(seen, steps, (200,), 0.0, tolerance=0.0)
