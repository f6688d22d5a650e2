"""The low-bit exchange against its simulation: bits, chunks, conservation, votes, and its bytes."""

import math

import pytest
import torch
from launch import spawn_gloo
from low_bit_oracle import LowBitRanks
from ranks import assert_same_bits, integers

from commhooks import LowBit
from commhooks.errors import SettingsMismatchError
from commhooks.exchange import Context
from commhooks.exchange.low_bit import Activity
from commhooks.transports import in_process
from commhooks.transports.distributed import DistributedTransport
from commhooks.wire.low_bit import chunks

BITS = (1, 2, 4, 8, 16, 32)
NUMELS = (1, 257, 1100)


def real(seed, n):
    """Numbers of very different sizes, exact zeros and negative zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator) * torch.randn(n, generator=generator).mul(3).exp()
    return torch.where(torch.rand(n, generator=generator) < 0.1, x * 0.0, x)


def steps_of(transport, numel, bits, steps=2):
    """A rank's means, residuals and owned memories over some steps with error feedback."""
    seen = []
    start, stop = chunks(numel, transport.world_size)[transport.rank]
    residual, owned = torch.zeros(numel), torch.zeros(stop - start)
    for step in range(steps):
        residual = residual + real(100 * step + transport.rank, numel)
        out = LowBit(bits).mean(transport, residual, owned, False, Context(0, step))
        assert not out.nonfinite
        owned = out.owned
        seen.append((out.mean, residual.clone(), owned.clone()))
    return seen


def check(results, numel, bits):
    world_size = len(results)
    ranks = LowBitRanks(world_size, numel, bits)
    kept = [torch.zeros(numel)] * world_size
    for step in range(len(results[0])):
        mean, kept = ranks.exchange([k + real(100 * step + p, numel) for p, k in enumerate(kept)])
        for p in range(world_size):
            found, residual, owned = results[p][step]
            start, stop = chunks(numel, world_size)[p]
            assert_same_bits(found, mean)
            assert torch.equal(residual, kept[p]), (step, p)
            assert torch.equal(owned, ranks.owned[start:stop]), (step, p)


@pytest.mark.parametrize("world_size", (1, 2, 3, 4, 5))
def test_equals_the_simulation_to_the_last_bit(world_size):
    cases = [(numel, bits) for numel in NUMELS for bits in BITS]
    results = in_process.run(world_size, lambda t: [steps_of(t, *case) for case in cases])
    for number, case in enumerate(cases):
        check([rank[number] for rank in results], *case)


@pytest.mark.parametrize("world_size", (2, 3))
def test_over_gloo_too(world_size):
    cases = [(numel, bits) for numel in (3, 600) for bits in BITS]

    def work(rank, size):
        transport = DistributedTransport(timeout_s=30.0)
        return [steps_of(transport, *case) for case in cases]

    results = spawn_gloo(work, world_size)
    for number, case in enumerate(cases):
        check([rank[number] for rank in results], *case)


def test_chunks_are_whole_blocks_and_as_even_as_they_go():
    for numel in (0, 1, 256, 257, 1000, 256 * 7):
        for world_size in range(1, 9):
            bounds = chunks(numel, world_size)
            assert [stop for _, stop in bounds[:-1]] == [start for start, _ in bounds[1:]]
            assert bounds[0][0] == 0 and bounds[-1][1] == numel
            assert all(start % 256 == 0 or start == numel for start, _ in bounds)
            sizes = [-(-(stop - start) // 256) for start, stop in bounds]
            assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("world_size", range(1, 9))
@pytest.mark.parametrize("bits", (1, 2, 4, 8))
def test_what_is_given_is_in_the_mean_or_kept(world_size, bits):
    """``mean_p x_p + owned`` is the same before and after. Exact where 1/P is: integers, and scales of few bits."""
    numel = 600

    def work(transport):
        generator = torch.Generator().manual_seed(transport.rank)
        start, stop = chunks(numel, world_size)[transport.rank]
        residual, owned, seen = torch.zeros(numel), torch.zeros(stop - start), []
        for step in range(3):
            residual = residual + integers(generator, numel, low=-64, high=64)
            before = residual.double(), owned.double()
            out = LowBit(bits).mean(transport, residual, owned, False, Context(0, step))
            sent = torch.zeros(numel)
            out.give_back(sent)
            assert torch.equal(sent.double() + residual, before[0])  # exact: nothing of the sender is lost
            seen.append((sent.double(), before[1], out.mean.double(), out.owned.double()))
            owned = out.owned
        return seen

    results = in_process.run(world_size, work)
    for step in range(3):
        sent = sum(rank[step][0] for rank in results) / world_size
        had = torch.cat([rank[step][1] for rank in results])
        have = torch.cat([rank[step][3] for rank in results])
        mean = results[0][step][2]
        wrong = (sent + had - mean - have).abs().max()
        if math.log2(world_size).is_integer():
            assert wrong == 0.0
        else:  # 1/P itself is rounded
            assert wrong <= 2e-7 * sent.abs().max()
        assert world_size == 1 or any(rank[step][3].any() for rank in results)


@pytest.mark.parametrize("world_size", (1, 2, 3, 4, 5))
def test_bfloat16_keeps_exactly_what_it_rounds_off(world_size):
    """Of numbers of any size, at any number of ranks: what an element's sender and owner keep is exact."""
    numel = 1001  # odd: codes end in the middle of a word

    def work(transport):
        start, stop = chunks(numel, world_size)[transport.rank]
        x, owned = real(transport.rank, numel), real(50, numel)[start:stop]
        values, sent = x.clone(), torch.zeros(numel)
        out = LowBit(16).mean(transport, values, owned, False, Context(0, 0))
        out.give_back(sent)
        assert torch.equal(sent, sent.bfloat16().float()) and torch.equal(x.double(), sent.double() + values)
        assert torch.equal(out.mean, out.mean.bfloat16().float())
        return sent, owned, out

    results = in_process.run(world_size, work)
    total = torch.zeros(numel)
    for sent, _, _ in results:
        total += sent
    total = total * (1.0 / world_size) + torch.cat([owned for _, owned, _ in results])
    kept = torch.cat([out.owned for _, _, out in results])
    assert kept.any()
    for _, _, out in results:
        assert torch.equal(out.mean.double() + kept, total.double())


def test_bfloat16_at_the_ends_of_the_range():
    """A finite element that bfloat16 would round to infinity is sent in two parts; infinities are votes."""
    largest = torch.finfo(torch.float32).max
    x = torch.tensor([largest, -largest, 1e-45, -1e-45, 0.0, 1e-38, 3.3895314e38])

    def work(transport, values):
        start, stop = chunks(values.numel(), 2)[transport.rank]
        given = values.clone() if transport.rank == 0 else torch.zeros_like(values)
        owned = torch.zeros(stop - start)
        out = LowBit(16).mean(transport, given, owned, False, Context(0, 0))
        return out.nonfinite, given, out

    nonfinite, kept, out = in_process.run(2, lambda t: work(t, x))[0]
    assert not nonfinite
    sent = torch.zeros_like(x)
    out.give_back(sent)
    assert bool(sent.isfinite().all()) and torch.equal(sent.double() + kept, x.double()) and kept[:2].all()
    for bad in (float("inf"), -float("inf"), float("nan")):
        spoiled = torch.tensor([1.0, bad])
        assert [r[0] for r in in_process.run(2, lambda t: work(t, spoiled))] == [True, True]  # noqa: B023


def test_a_vote_on_one_rank_reaches_all_and_nothing_is_lost():
    def work(transport):
        x = real(transport.rank, 700)
        start, stop = chunks(700, 3)[transport.rank]
        values, owned = x.clone(), torch.ones(stop - start)
        out = LowBit(4).mean(transport, values, owned, transport.rank == 1, Context(3, 5))
        out.give_back(values)
        sent = transport.counters.bytes_sent
        again = LowBit(4).mean(transport, x.clone(), owned, False, Context(3, 6))
        return out.nonfinite, float((values - x).abs().max() / x.abs().max()), owned, sent, again.mean

    results = in_process.run(3, work)
    for nonfinite, off, owned, sent, again in results:
        assert nonfinite and off <= 1e-6 and bool((owned == 1).all())
        assert sent < 2 * 700  # there is no second half
        assert_same_bits(again, results[0][4])


def test_a_sum_that_overflows_is_a_vote_of_its_owner():
    def work(transport):
        start, stop = chunks(512, 3)[transport.rank]
        owned = torch.zeros(stop - start)
        values = torch.full((512,), 3e38)
        return LowBit(32).mean(transport, values, owned, False, Context(0, 0)).nonfinite

    assert in_process.run(3, work) == [True] * 3


@pytest.mark.parametrize("bits", (1, 2, 4, 8, 16))
def test_a_parameter_that_no_rank_has_a_gradient_of_gets_none(bits):
    """The middle one is silent everywhere, the last on rank 0 only; what its owner had kept of it stays."""
    offsets = [0, 100, 300, 600]

    def work(transport):
        rank = transport.rank
        x = real(rank, 600)
        flags = torch.tensor([True, False, rank != 0])
        x[100:300] = 0.0
        if rank == 0:
            x[300:] = 0.0
        start, stop = chunks(600, 2)[rank]
        owned = torch.arange(600.0)[start:stop]
        values = x.clone()
        out = LowBit(bits).mean(transport, values, owned, False, Context(0, 0), Activity(flags, offsets))
        return x, values, owned, out

    results = in_process.run(2, work)
    mean = results[0][3].mean
    assert_same_bits(mean, results[1][3].mean)
    assert not mean[100:300].any() and mean[:100].any() and mean[300:].any()
    given = sum((x - values).double() for x, values, _, _ in results) / 2
    had = torch.cat([owned for _, _, owned, _ in results]).double()
    have = torch.cat([out.owned for _, _, _, out in results]).double()
    torch.testing.assert_close(mean.double() + have, given + had, rtol=1e-6, atol=1e-4)


def test_ranks_that_are_out_of_step_are_told():
    def work(transport):
        with pytest.raises(SettingsMismatchError, match=r"expected bucket 0, step [01] from rank"):
            LowBit(1).mean(transport, torch.ones(4), torch.zeros(4), False, Context(0, transport.rank))

    in_process.run(1, lambda t: None)
    in_process.run(2, lambda t: work(t) if t.rank == 0 else _peer(t))


def _peer(transport):
    with pytest.raises(SettingsMismatchError):
        LowBit(1).mean(transport, torch.ones(4), torch.zeros(0), False, Context(0, 1))


@pytest.mark.parametrize("bits", (1, 16))
@pytest.mark.parametrize("numel", (1, 700, 100_000))
def test_the_bytes_are_those_that_the_formula_says(numel, bits):
    def work(transport):
        start, stop = chunks(numel, 4)[transport.rank]
        aggregator = LowBit(bits)
        flags = Activity(torch.ones(1, dtype=torch.bool), [0, numel])
        aggregator.mean(transport, torch.ones(numel), torch.zeros(stop - start), False, Context(0, 0), flags)
        return transport.counters.bytes_sent, aggregator.wire_bytes(numel, 4)

    results = in_process.run(4, work)
    sent, promised = max(r[0] for r in results), results[0][1]
    assert sent <= promised <= sent + 3 * 34
    if numel == 100_000:
        assert sent == pytest.approx(2 * 3 / 4 * numel * (2 if bits == 16 else 1 / 8 + 1 / 128), rel=0.02)


def test_bits_that_do_not_exist_are_refused():
    for bits in (0, 3, 24, True, "4", None):
        with pytest.raises(ValueError, match="bits must be one of 1, 2, 4, 8, 16, 32"):
            LowBit(bits)
    with pytest.raises(ValueError, match="transport"):
        LowBit(4, "carrier pigeon")
    assert repr(LowBit(2)) == "LowBit(bits=2)"
