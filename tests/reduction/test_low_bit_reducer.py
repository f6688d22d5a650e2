"""``lowbit`` through the Reducer: the simulation's bits, mass, layouts, checkpoints, undone steps, policies."""

import pytest
import torch
from low_bit_oracle import LowBitRanks
from ranks import assert_same_bits, integers, memory_of

from commhooks import (
    AllGather,
    Bucket,
    Dense,
    ErrorFeedback,
    LowBit,
    NoMemory,
    Reducer,
    SparseState,
    TopK,
)
from commhooks.schemes import make_parts
from commhooks.transports import in_process
from commhooks.wire.low_bit import chunks

N = 1500


def reducer(transport, bits=4, memory=None, **options):
    options = {"dense_crossover": False, **options}
    return Reducer(None, LowBit(bits, transport), memory or ErrorFeedback(), **options)


def gradients(world_size, steps, n=N, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(n, generator=generator) for _ in range(world_size)] for _ in range(steps)]


def owned_of(red, sizes):
    """What this rank owns of the named parameters, flat and zero elsewhere, in the units of a mean."""
    state = red.memory.table.state_dict().get("owned", {})
    parts = []
    for name, n in sizes.items():
        part = torch.zeros(n)
        for start, kept in state.get(name, {}).items():
            part[start : start + kept.numel()] += kept
        parts.append(part)
    return torch.cat(parts)


def withheld(results, sizes):
    """``mean_p residual_p + owned`` in float64, of ``(residual, owned)`` of each rank."""
    return sum(r.double() for r, _ in results) / len(results) + sum(o.double() for _, o in results)


@pytest.mark.parametrize("world_size", (1, 2, 3, 4, 5, 8))
@pytest.mark.parametrize("bits", (2, 4, 8))
def test_the_reducer_is_the_simulation(world_size, bits):
    given = gradients(world_size, 4)

    def work(transport):
        red, seen = reducer(transport, bits), []
        for step in given:
            buffer = step[transport.rank].clone()
            red.reduce(Bucket(0, buffer, ("a", "b"), (1000, 500)))
            seen.append((buffer, memory_of(red, "ab")[0], owned_of(red, {"a": 1000, "b": 500})))
        return seen, red.stats()

    results = in_process.run(world_size, work)
    ranks = LowBitRanks(world_size, N, bits)
    kept = [torch.zeros(N)] * world_size
    for step, vectors in enumerate(given):
        mean, kept = ranks.exchange([k + g for k, g in zip(kept, vectors, strict=True)])
        for p, (seen, _) in enumerate(results):
            assert torch.equal(seen[step][0], mean) and torch.equal(seen[step][1], kept[p])
        assert torch.equal(sum(seen[step][2] for seen, _ in results), ranks.owned)
    if world_size == 4:
        assert 4 * N / results[0][1]["bytes_sent"] > 32 / bits / 1.5 / 1.5


def test_lossless_is_the_dense_reducer_bit_for_bit():
    given = gradients(3, 3)

    def work(transport):
        outputs = []
        for aggregator, memory in (
            (LowBit(32, transport), ErrorFeedback()),
            (Dense(transport), ErrorFeedback()),
        ):
            red = Reducer(None, aggregator, memory, dense_crossover=False)
            buffers = [step[transport.rank].clone() for step in given]
            for buffer in buffers:
                red.reduce(Bucket(0, buffer, ("a",), (N,)))
            outputs.append(torch.cat(buffers))
        return outputs

    for lossless, dense in in_process.run(3, work):
        assert_same_bits(lossless, dense)


LAYOUTS = [
    ["ab", "c", "de"],
    ["ab", "c", "de"],
    ["edc", "ba"],
    ["edcba"],
    ["ab", "c", "de"],
    ["ab", "c", "de"],
]
SIZES = {"a": 300, "b": 520, "c": 700, "d": 9, "e": 411}


def laid(red, mine, layout):
    """One step of named gradients through the buckets of a layout; returns the update, flat by name."""
    update = {}
    for index, names in enumerate(layout):
        buffer = torch.cat([mine[n] for n in names])
        numels = tuple(SIZES[n] for n in names)
        red.reduce(Bucket(index, buffer, tuple(names), numels, index == len(layout) - 1))
        update |= dict(zip(names, buffer.split(numels), strict=True))
    return torch.cat([update[n] for n in SIZES])


def named(generator):
    return {name: integers(generator, n) for name, n in SIZES.items()}


@pytest.mark.parametrize("world_size", (2, 4))
@pytest.mark.parametrize("dense_step", (None, 2))
def test_mass_is_conserved_while_buckets_are_laid_anew(world_size, dense_step):
    """Owners change with the layout: what an owner no longer owns is in its residual, to the last bit."""

    def work(transport):
        generator = torch.Generator().manual_seed(transport.rank)
        red, seen = reducer(transport, 4), []
        for step, layout in enumerate(LAYOUTS):
            mine = named(generator)
            if step == dense_step:
                red.send_everything()
            update = laid(red, mine, layout)
            given = torch.cat([mine[n] for n in SIZES])
            seen.append((given, update, memory_of(red, SIZES)[0], owned_of(red, SIZES)))
        return seen

    results = in_process.run(world_size, work)
    before = torch.zeros(sum(SIZES.values()), dtype=torch.float64)
    for step in range(len(LAYOUTS)):
        now = [rank[step] for rank in results]
        given = sum(g.double() for g, *_ in now) / world_size
        after = withheld([(r, o) for _, _, r, o in now], SIZES)
        assert torch.equal(before + given, now[0][1].double() + after), step
        assert any(o.any() for *_, o in now) == (step != dense_step)
        before = after


@pytest.mark.parametrize("scale", (1.0, 1024.0))
def test_a_step_with_nan_on_one_rank_is_taken_back(scale):
    """Under a loss scale too. The step's other bucket had been exchanged: what it sent is in its residual again."""

    def work(transport):
        generator = torch.Generator().manual_seed(transport.rank)
        red = reducer(transport, 8, nonfinite="propagate")
        for step in range(3):
            a, b = (integers(generator, 600) * scale for _ in range(2))
            if step == 1 and transport.rank == 1:
                b[5] = float("nan")
            before, given = red.memory.table.state_dict(), {"a": a / scale, "b": torch.zeros(600)}
            red.reduce(Bucket(0, a, ("a",), (600,), is_last=False), scale)
            red.reduce(Bucket(1, b, ("b",), (600,)), scale)
            if step == 1:
                after = red.memory.table.state_dict()
                for name in "ab":
                    assert torch.equal(before["residual"][name] + given[name], after["residual"][name])
                    for start, kept in before["owned"][name].items():
                        assert torch.equal(kept, after["owned"][name][start])
                assert bool(b.isnan().all())
        return a, red.stats()["nonfinite_steps"]

    results = in_process.run(2, work)
    assert results[0][1] == 1 and bool(results[0][0].any())
    assert_same_bits(results[0][0], results[1][0])


@pytest.mark.parametrize("dense_step", (False, True))
def test_a_discarded_step_leaves_no_trace(dense_step):
    """The step after a discarded one is the step that would have been, bit for bit; rates that changed too.

    A step that sends everything moves what the owners kept into the residuals, which is undone as well.
    """
    given = gradients(3, 4, seed=3)

    def work(transport, discards):
        parameter = torch.nn.Parameter(torch.zeros(N))
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        memory = ErrorFeedback(rescale_with_lr=optimizer)
        red = reducer(transport, 4, memory, undoable=True)
        red.memory.table.names = {parameter: "p"}
        outputs = []
        for step, rate in enumerate((1.0, 1.0, 0.5, 0.25)):
            if step == 2 and discards:
                optimizer.param_groups[0]["lr"] = 0.125
                if dense_step:
                    red.send_everything()
                red.reduce(Bucket(0, given[0][transport.rank].clone(), (parameter,), (N,)))
                red.discard()
            optimizer.param_groups[0]["lr"] = rate
            buffer = given[step][transport.rank].clone()
            red.reduce(Bucket(0, buffer, (parameter,), (N,)))
            outputs.append(buffer)
        return torch.cat(outputs), red.state_dict()["owned"]["p"] if transport.rank == 0 else None

    plain = in_process.run(3, lambda t: work(t, False))
    undone = in_process.run(3, lambda t: work(t, True))
    for (a, _), (b, _) in zip(plain, undone, strict=True):
        assert_same_bits(a, b)
    assert all(torch.equal(kept, undone[0][1][start]) for start, kept in plain[0][1].items())


@pytest.mark.parametrize("scheme", ("topk", "lowbit"))
def test_a_discarded_step_undoes_only_the_buckets_that_were_in_it(scheme):
    given = gradients(2, 4, seed=5)

    def work(transport):
        selector, aggregator = (
            (TopK(0.1), AllGather(transport)) if scheme == "topk" else (None, LowBit(4, transport))
        )
        red = Reducer(selector, aggregator, ErrorFeedback(), dense_crossover=False, undoable=True)
        for step in range(3):
            red.reduce(Bucket(0, given[step][transport.rank].clone(), ("a",), (N,), is_last=False))
            red.reduce(Bucket(1, given[step][transport.rank].clone(), ("b",), (N,)))
        before = red.state_dict()
        red.reduce(Bucket(0, given[3][transport.rank].clone(), ("a",), (N,)))
        red.discard()
        return before, red.state_dict()

    for before, after in in_process.run(2, work):
        for name in "ab":
            assert torch.equal(before["residual"][name], after["residual"][name])
            for start, kept in before.get("owned", {}).get(name, {}).items():
                assert torch.equal(kept, after["owned"][name][start])


@pytest.mark.parametrize("scheme", ("topk", "lowbit"))
def test_a_step_that_is_left_out_keeps_residual_and_rate_together(scheme):
    """Where the rate changes in a step with NaN, an undoable state goes on as one that is not undoable."""
    given = gradients(2, 4, seed=6)

    def work(transport, undoable):
        parameter = torch.nn.Parameter(torch.zeros(N))
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        selector, aggregator = (
            (TopK(0.1), AllGather(transport)) if scheme == "topk" else (None, LowBit(4, transport))
        )
        memory = ErrorFeedback(rescale_with_lr=optimizer)
        red = Reducer(
            selector, aggregator, memory, dense_crossover=False, undoable=undoable, nonfinite="skip"
        )
        outputs = []
        for step, rate in enumerate((1.0, 0.5, 0.5, 0.5)):
            optimizer.param_groups[0]["lr"] = rate
            buffer = given[step][transport.rank].clone()
            if step == 1 and transport.rank == 1:
                buffer[3] = float("nan")
            red.reduce(Bucket(0, buffer, (parameter,), (N,)))
            outputs.append(buffer)
        return torch.cat(outputs)

    plain = in_process.run(2, lambda t: work(t, False))
    undoable = in_process.run(2, lambda t: work(t, True))
    torch.testing.assert_close(plain[0], undoable[0], rtol=0, atol=1e-4)


def test_in_units_of_parameters_the_owners_part_follows_the_rate_too():
    """Halving the rate doubles what waits, at sender and owner: rate times the withheld is conserved."""

    def work(transport):
        parameter = torch.nn.Parameter(torch.zeros(N))
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        red = reducer(transport, 4, ErrorFeedback(rescale_with_lr=optimizer))
        red.memory.table.names = {parameter: "p"}
        generator = torch.Generator().manual_seed(transport.rank)
        seen = []
        for rate in (1.0, 0.5, 0.5, 0.25):
            optimizer.param_groups[0]["lr"] = rate
            g = integers(generator, N)
            buffer = g.clone()
            red.reduce(Bucket(0, buffer, (parameter,), (N,)))
            state = red.memory.table.state_dict()
            seen.append((rate, g, buffer, state["residual"]["p"], owned_of(red, {"p": N})))
        return seen

    results = in_process.run(2, work)
    before = torch.zeros(N, dtype=torch.float64)
    for step in range(4):
        now = [rank[step] for rank in results]
        rate = now[0][0]
        given = sum(g.double() for _, g, *_ in now) / 2
        after = withheld([(r, o) for *_, r, o in now], None)
        assert torch.equal(before + rate * given, rate * (now[0][2].double() + after)), step
        before = rate * after


def test_resuming_is_bit_exact_and_another_world_size_conserves():
    layout = ["abc", "de"]

    def steps(red, rank, first, last):
        generator = torch.Generator().manual_seed(rank)
        updates = []
        for step in range(last):
            mine = named(generator)
            if step >= first:
                updates.append(laid(red, mine, layout))
        return updates

    def first(transport):
        red = reducer(transport, 4)
        steps(red, transport.rank, 0, 3)
        saved = red.state_dict()
        return saved, (memory_of(red, SIZES)[0], owned_of(red, SIZES)), steps(red, transport.rank, 3, 5)

    before = in_process.run(4, first)
    states = [saved for saved, *_ in before]

    def resumed(transport):
        red = reducer(transport, 4)
        red.load_state_dict(states[transport.rank])
        return steps(red, transport.rank, 3, 5)

    for (_, _, expected), got in zip(before, in_process.run(4, resumed), strict=True):
        for a, b in zip(expected, got, strict=True):
            assert_same_bits(a, b)

    for world_size in (1, 2, 8):

        def other(transport):
            red = reducer(transport, 4)
            red.load_state_dict(states)
            zero = {name: torch.zeros(n) for name, n in SIZES.items()}
            saved_again = owned_of(red, SIZES)  # nothing has been placed yet: it must not be lost here either
            update = laid(red, zero, layout)
            return (memory_of(red, SIZES)[0], owned_of(red, SIZES)), update, saved_again

        after = in_process.run(world_size, other)
        kept = withheld([pair for pair, *_ in after], SIZES)
        expected = withheld([pair for _, pair, _ in before], SIZES)
        assert torch.equal(kept + after[0][1].double(), expected), world_size
        assert sum(float(again.abs().sum()) for *_, again in after) > 0


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_keeps_what_rounding_takes(dtype):
    def work(transport):
        generator = torch.Generator().manual_seed(transport.rank)
        red, seen = reducer(transport, 8), []
        for _ in range(3):
            g = torch.randn(600, generator=generator).to(dtype)
            buffer = g.clone()
            red.reduce(Bucket(0, buffer, ("a",), (600,)))
            seen.append((g, buffer, memory_of(red, "a")[0], owned_of(red, {"a": 600})))
        return seen

    results = in_process.run(4, work)
    before = torch.zeros(600, dtype=torch.float64)
    for step in range(3):
        now = [rank[step] for rank in results]
        given = sum(g.double() for g, *_ in now) / 4
        after = withheld([(r, o) for _, _, r, o in now], None)
        torch.testing.assert_close(before + given, now[0][1].double() + after, rtol=0, atol=1e-6)
        before = after


def test_a_sum_instead_of_an_average_and_no_memory():
    given = gradients(4, 2, seed=5)

    def work(transport):
        outputs = []
        for average, memory in ((True, ErrorFeedback()), (False, ErrorFeedback()), (True, NoMemory())):
            red = reducer(transport, 4, memory, average=average)
            buffers = [step[transport.rank].clone() for step in given]
            for buffer in buffers:
                red.reduce(Bucket(0, buffer, ("a",), (N,)))
            outputs.append(buffers)
        assert "owned" not in red.memory.table.state_dict()
        return outputs

    mean, total, forgetful = in_process.run(4, work)[0]
    for a, b in zip(mean, total, strict=True):
        assert torch.equal(4 * a, b)
    assert torch.equal(mean[0], forgetful[0]) and not torch.equal(mean[1], forgetful[1])
    expected, _ = LowBitRanks(4, N, 4).exchange(given[1])
    assert torch.equal(forgetful[1], expected)


def test_momentum_in_the_memory_and_parameters_without_a_gradient():
    """The simulation with a velocity. Parameter b has no gradient on any rank in step 1, and is left at 0."""
    given = gradients(3, 3, seed=6)
    for g in given[1]:
        g[1000:] = 0.0

    def work(transport):
        red, outputs = reducer(transport, 4, ErrorFeedback(0.5)), []
        for step in given:
            buffer = step[transport.rank].clone()
            red.reduce(Bucket(0, buffer, ("a", "b"), (1000, 500)))
            outputs.append((buffer, memory_of(red, "ab")[0], owned_of(red, {"a": 1000, "b": 500})))
        return outputs

    results = in_process.run(3, work)
    assert not results[0][1][0][1000:].any() and results[0][1][0][:1000].any()
    ranks, kept, velocity = LowBitRanks(3, N, 4), [torch.zeros(N)] * 3, [torch.zeros(N)] * 3
    for step, vectors in enumerate(given):
        active = torch.tensor([True] * 1000 + [step != 1] * 500)
        velocity = [torch.where(active, 0.5 * v + g, v) for v, g in zip(velocity, vectors, strict=True)]
        corrected = [k + torch.where(active, v, 0.0) for k, v in zip(kept, velocity, strict=True)]
        sent = [torch.where(active, c, 0.0) for c in corrected]
        before = ranks.owned
        mean, left = ranks.exchange(sent)
        kept = [torch.where(active, r, c + r) for r, c in zip(left, corrected, strict=True)]
        ranks.owned = torch.where(active, ranks.owned, ranks.owned + mean)
        mean = torch.where(active, mean, 0.0)
        assert step != 1 or torch.equal(ranks.owned[1024:], before[1024:])
        for p in range(3):
            assert torch.equal(results[p][step][0], mean) and torch.equal(results[p][step][1], kept[p])
        assert torch.equal(sum(r[step][2] for r in results), ranks.owned)


def test_small_buckets_go_densely_and_settings_must_agree():
    state = SparseState.lowbit(8)
    assert repr(state.reducer.aggregator) == "LowBit(bits=8)" and type(state.reducer.memory) is ErrorFeedback
    assert make_parts("lowbit")[1].bits == 4
    for wrong in (lambda: Reducer(TopK(0.1), LowBit()), lambda: Reducer(None, AllGather())):
        with pytest.raises(ValueError, match="Dense and LowBit take no selector"):
            wrong()
    with pytest.raises(ValueError, match="ddp_allreduce"):
        SparseState.lowbit(memory=NoMemory(), ddp_allreduce=True)

    def work(transport):
        red = Reducer(None, LowBit(4, transport))
        buffer = torch.full((8,), float(transport.rank))
        red.reduce(Bucket(0, buffer, ("a",), (8,)))
        return buffer, red.stats()["bytes_sent"]

    for buffer, sent in in_process.run(2, work):
        assert buffer.tolist() == [0.5] * 8 and sent <= 4 * 9

    def differing(transport):
        red = reducer(transport, 4 + 4 * transport.rank)
        with pytest.raises(Exception, match=r"bits: [48] here, [84] on rank [01]"):
            red.reduce(Bucket(0, torch.ones(N), ("a",), (N,)))

    in_process.run(2, differing)
    assert chunks(0, 2) == [(0, 0), (0, 0)]


def test_mass_is_conserved_in_random_problems():
    """Any P, n and bits; zeros, equal magnitudes, and parameters without a gradient on some ranks or on all."""
    for seed in range(16):
        generator = torch.Generator().manual_seed(seed)
        draw = lambda low, high: int(torch.randint(low, high, (), generator=generator))  # noqa: B023, E731
        world_size, bits = draw(1, 10), (1, 2, 4, 8)[seed % 4]
        sizes = {name: draw(1, 200) for name in "abcd"[: draw(1, 5)]}
        steps = []
        for _ in range(3):
            ranks = [integers(generator, sum(sizes.values())) for _ in range(world_size)]
            for g in ranks:
                for part in g.split(tuple(sizes.values())):
                    if draw(0, 3) == 0:
                        part.zero_()
            steps.append(ranks)

        def work(transport):
            red, seen = reducer(transport, bits), []  # noqa: B023
            for step in steps:  # noqa: B023
                buffer = step[transport.rank].clone()
                red.reduce(Bucket(0, buffer, tuple(sizes), tuple(sizes.values())))  # noqa: B023
                seen.append((buffer, memory_of(red, sizes)[0], owned_of(red, sizes)))  # noqa: B023
            return seen

        results = in_process.run(world_size, work)
        before = torch.zeros(sum(sizes.values()), dtype=torch.float64)
        for step, given in enumerate(steps):
            now = [rank[step] for rank in results]
            update, after = now[0][0], withheld([(r, o) for _, r, o in now], sizes)
            given = sum(g.double() for g in given) / world_size
            torch.testing.assert_close(update.double() + after, before + given, rtol=0, atol=2e-5)
            silent = torch.stack(steps[step]).split(tuple(sizes.values()), dim=1)
            for part, column in zip(update.split(tuple(sizes.values())), silent, strict=True):
                assert column.any() or not part.any(), (seed, step)
            before = after
            for buffer, *_ in now:
                assert_same_bits(buffer, update)
