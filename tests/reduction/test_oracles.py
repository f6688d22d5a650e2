"""The Reducer over in_process against the plain simulations, at P = 1, 2, 3, 4, 5, 8."""

import oracles
import pytest
import torch
from ranks import SCHEMES, assert_same_bits, integers, memory_of, reducer, run_steps

from commhooks import Bucket, ErrorFeedback
from commhooks.native import ops
from commhooks.transports import in_process

SIZES = (1, 2, 3, 4, 5, 8)
N, K, STEPS = 60, 6, 6
DENSITY = K / N


def oracle(scheme, world_size, n=N, k=K, **options):
    name = scheme.removesuffix("-tree")
    return oracles.Workers(world_size, n, k, name, seed=7, **options)


def make_gradients(world_size, steps, n, exact, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = (
        (lambda: integers(generator, n, unit=1024.0))
        if exact
        else lambda: torch.randn(n, generator=generator)
    )
    return [[draw() for _ in range(world_size)] for _ in range(steps)]


def compare(seen, workers, gradients, factor=1.0, exact=True):
    for step, ranks in enumerate(seen):
        total = workers.step(gradients[step]) * factor
        for p, rank in enumerate(ranks):
            if exact:
                assert torch.equal(rank.output, total), (step, p)
            else:
                torch.testing.assert_close(rank.output, total, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(rank.residual, workers.u[p], rtol=0, atol=0)
            if rank.velocity is not None:
                torch.testing.assert_close(rank.velocity, workers.v[p], rtol=0, atol=0)
            assert_same_bits(rank.output, ranks[0].output)


@pytest.mark.parametrize("world_size", SIZES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_integers_are_reduced_to_the_last_bit(scheme, world_size):
    gradients = make_gradients(world_size, STEPS, N, exact=True)
    seen = run_steps(world_size, scheme, DENSITY, gradients)
    compare(seen, oracle(scheme, world_size), gradients)


@pytest.mark.parametrize("world_size", SIZES)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("masking", (False, True))
def test_momentum_and_factor_masking_to_the_last_bit(scheme, world_size, masking):
    """beta = 1/2 on multiples of 1024 is exact for these few steps."""
    gradients = make_gradients(world_size, STEPS, N, exact=True, seed=1)
    seen = run_steps(
        world_size, scheme, DENSITY, gradients, memory=lambda: ErrorFeedback(0.5, factor_masking=masking)
    )
    assert any(rank.velocity.any() for rank in seen[-1])
    compare(seen, oracle(scheme, world_size, beta=0.5, factor_masking=masking), gradients)


@pytest.mark.parametrize("world_size", SIZES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_real_numbers_averaged_to_rounding_with_the_same_memory(scheme, world_size):
    gradients = make_gradients(world_size, STEPS, N, exact=False, seed=2)
    seen = run_steps(
        world_size,
        scheme,
        DENSITY,
        gradients,
        average=True,
        memory=lambda: ErrorFeedback(0.9, factor_masking=True),
    )
    workers = oracle(scheme, world_size, beta=0.9, factor_masking=True)
    compare(seen, workers, gradients, factor=1.0 / world_size, exact=False)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_parameters_without_gradient_take_no_part(scheme):
    world_size, segments = 3, (10, 20, 5, 25)
    gradients = make_gradients(world_size, STEPS, N, exact=True, seed=3)
    for step, ranks in enumerate(gradients):
        for p, g in enumerate(ranks):
            for i, part in enumerate(g.split(segments)):
                if (step + p + i) % 3 == 0 or (i == 2 and step > 1):  # some on one rank, one on all ranks
                    part.zero_()
    seen = run_steps(world_size, scheme, 0.2, gradients, segments, memory=lambda: ErrorFeedback(0.5))
    workers = oracle(scheme, world_size, k=12, beta=0.5, segments=segments)
    compare(seen, workers, gradients)
    assert seen[-1][0].residual[30:35].any() or scheme == "dense"  # the third parameter still waits


@pytest.mark.parametrize("scheme", ["union", "gtopk", "shared", "dense"])
def test_residual_in_parameter_units_follows_the_learning_rate(scheme):
    """Two parameter groups with their own rates, which change, one of them to 0 for a while."""
    world_size, rates = 3, [(0.5, 2.0), (0.25, 2.0), (0.25, 0.0), (0.125, 1.0), (0.5, 1.0)]
    gradients = make_gradients(world_size, len(rates), N, exact=True, seed=4)
    half = N // 2

    def work(transport):
        parameters = [torch.nn.Parameter(torch.zeros(half)) for _ in range(2)]
        optimizer = torch.optim.SGD([{"params": [p], "lr": 1.0} for p in parameters])
        memory = ErrorFeedback(rescale_with_lr=optimizer)
        red = reducer(scheme, transport, DENSITY, memory)
        red.memory.table.names = {parameters[0]: "a", parameters[1]: "b"}
        outputs = []
        for step, both in enumerate(rates):
            for group, rate in zip(optimizer.param_groups, both):
                group["lr"] = rate
            buffer = gradients[step][transport.rank].clone()
            red.reduce(Bucket(0, buffer, tuple(parameters), (half, half)))
            outputs.append((buffer, memory_of(red, "ab")[0]))
        return outputs

    results = in_process.run(world_size, work)
    workers = oracle(scheme, world_size, segments=(half, half))
    last = list(rates[0])
    for step, both in enumerate(rates):
        for i, rate in enumerate(both):
            if rate:
                for u in workers.u:
                    u[i * half : (i + 1) * half] *= last[i] / rate
                last[i] = rate
            else:  # the parameter takes no part
                for gradient in gradients[step]:
                    gradient[i * half : (i + 1) * half] = 0.0
        total = workers.step(gradients[step])
        for p in range(world_size):
            assert torch.equal(results[p][step][0], total), step
            assert torch.equal(results[p][step][1], workers.u[p]), step


@pytest.mark.parametrize("scheme", SCHEMES)
def test_memory_follows_parameters_into_other_buckets(scheme):
    """The layouts A, B (other order, other cuts, fewer buckets), A again; dense in between nothing is lost."""
    world_size = 3
    sizes = {"a": 7, "b": 20, "c": 13, "d": 9, "e": 11}
    layouts = [
        ["ab", "c", "de"],
        ["ab", "c", "de"],
        ["edc", "ba"],
        ["edcba"],
        ["ab", "c", "de"],
        ["ab", "c", "de"],
    ]
    generator = torch.Generator().manual_seed(5)
    gradients = [
        [{name: integers(generator, n) for name, n in sizes.items()} for _ in range(world_size)]
        for _ in layouts
    ]

    def work(transport):
        red = reducer(scheme, transport, 0.2, ErrorFeedback(0.5))
        totals = []
        for step, layout in enumerate(layouts):
            mine, update = gradients[step][transport.rank], {}
            for index, names in enumerate(layout):
                buffer = torch.cat([mine[n] for n in names])
                numels = tuple(sizes[n] for n in names)
                red.reduce(Bucket(index, buffer, tuple(names), numels, index == len(layout) - 1))
                update |= dict(zip(names, buffer.split(numels)))
            residual, velocity = memory_of(red, sizes)
            totals.append((torch.cat([update[n] for n in sizes]), residual, velocity))
            norm = float(residual.double().norm())
            assert abs(red.stats()["residual_norm"] - norm) <= 1e-9 * max(1.0, norm), (step, layout)
        return totals

    results = in_process.run(world_size, work)
    u = [torch.zeros(60) for _ in range(world_size)]
    v = [torch.zeros(60) for _ in range(world_size)]
    for step in range(len(layouts)):
        update, expected = results[0][step][0], torch.zeros(60)
        withheld = torch.zeros(60)
        for p in range(world_size):
            v[p] = 0.5 * v[p] + torch.cat([gradients[step][p][n] for n in sizes])
            assert torch.equal(results[p][step][2], v[p]), step
            assert torch.equal(results[p][step][0], update)
            expected += u[p] + v[p]
            u[p] = results[p][step][1]
            withheld += u[p]
        assert torch.equal(withheld + update, expected), step


def test_random_indices_are_the_ones_that_are_defined():
    for seed, step, stream, n, k in (
        (0, 0, 0, 10, 3),
        (7, 5, 2, 1000, 100),
        (2**62, 9, 1, 65537, 17),
        (1, 1, 1, 1, 1),
    ):
        expected = oracles.random_k(seed, step, stream, n, k)
        assert ops.random_indices(seed, step, stream, n, k).tolist() == expected
        assert len(set(expected)) == k


def test_the_paper_example_of_contribution():
    """Rank 1's 5 at index 0 is dropped by the merge with rank 0 (k = 1); ranks 2 and 3 bring index 0 back."""
    selections = [{1: 6.0}, {0: 5.0}, {0: 4.0}, {0: 4.0}]
    pairs, contributed = oracles.gtop_k(selections, 1)
    assert pairs == {0: 8.0} and contributed == [set(), set(), {0}, {0}]
