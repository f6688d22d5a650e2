"""The cost model against counts made by hand and by the transports themselves."""

import math
from dataclasses import replace

import pytest
import torch

from commhooks import AllGather, GTopK, LowBit, SharedIndices, SparseGrad
from commhooks.planner import Costs, exchange_s, step_s
from commhooks.planner.cost_model import (
    DOUBLING_BYTES,
    SCHEMES,
    core_rounds,
    exchange_terms,
    exposed_s,
    periodic_averaging_s,
    step_terms,
)
from commhooks.transports import in_process
from commhooks.wire.low_bit import chunks
from commhooks.wire.message import Context

RANKS = (1, 2, 3, 4, 5, 6, 7, 8, 16, 33, 64, 1024)


def costs(mbit=1000.0, alpha=1e-4, **others):
    """A plausible CPU cluster at `mbit` Mbit/s."""
    base = Costs(alpha, 8e-6 / mbit, alpha / 2, 2e-10, 3e-8, 1e-9, 4e-10, 4e-10, 2e-4, 1e-4)
    return replace(base, **others)


@pytest.mark.parametrize("world_size", (2, 3, 4, 5, 6, 7, 8))
@pytest.mark.parametrize("scheme", ("topk", "gtopk", "gtopk-tree", "randomk"))
def test_bytes_are_what_a_rank_sends_at_most(scheme, world_size):
    """The tree's way back is serial, so its path is longer than what one rank sends; all others are equal."""
    # Threads count their all-reduce as a ring, so random-k sends more than goes by doubling.
    k, numel = (9000, 20_000) if scheme == "randomk" else (100, 5000)

    def exchange(transport):
        generator = torch.Generator().manual_seed(0 if scheme == "randomk" else transport.rank)
        places = torch.randperm(numel, generator=generator)[:k].sort().values.int()
        pairs = SparseGrad(torch.randn(k, generator=generator), places, numel)
        aggregator = {
            "topk": lambda: AllGather(transport),
            "gtopk": lambda: GTopK(transport),
            "gtopk-tree": lambda: GTopK(transport, algorithm="tree"),
            "randomk": lambda: SharedIndices(transport),
        }[scheme]()
        before = transport.counters.bytes_sent
        aggregator.aggregate(transport, pairs, False, Context(0, 0))
        return transport.counters.bytes_sent - before

    sent = max(in_process.run(world_size, exchange))
    path = exchange_terms(scheme, numel, k, world_size)["byte_s"]
    if scheme == "gtopk-tree" or (scheme == "gtopk" and world_size & (world_size - 1)):
        assert (
            sent <= path <= 2 * sent + 8 * k + 16 + k
        )  # fold in and out are waited for, sent by different ranks
    else:
        assert path == pytest.approx(sent, abs=8)


# Counted by hand for k = 100 pairs: a message of pairs has 816 bytes, on its way back 13 survival bits more, and random-k's
# 101 values have 404 bytes. 10,000 float32 (n + 1) are too many for doubling.
BY_HAND = {
    ("dense", 4): {"ring_step_s": 6, "byte_s": 6 * 10_000, "reduce_s": 3 * 2500},
    ("dense", 6): {"ring_step_s": 10, "byte_s": 10 * 40_000 / 6, "reduce_s": 5 * 10_000 / 6},
    ("randomk", 4): {"message_s": 2, "byte_s": 808, "reduce_s": 202},
    ("randomk", 6): {"ring_step_s": 10, "byte_s": 10 * 404 / 6, "reduce_s": 5 * 101 / 6},
    ("topk", 4): {"message_s": 2, "byte_s": 2448},
    ("topk", 6): {"ring_step_s": 5, "byte_s": 4080},
    # 6 ranks: fold in, two rounds of doubling (or up the tree), fold out.
    ("gtopk", 4): {"message_s": 2, "byte_s": 1632, "merge_s": 400},
    ("gtopk", 6): {"message_s": 4, "byte_s": 816 + 2 * 816 + 829, "merge_s": 600},
    ("gtopk-tree", 4): {"message_s": 4, "byte_s": 2 * 816 + 2 * 829, "merge_s": 400},
    ("gtopk-tree", 6): {"message_s": 6, "byte_s": 3 * 816 + 3 * 829, "merge_s": 600},
}
PASSES = {
    "dense": {"write_s": 9999, "dense_bucket_s": 1},
    "randomk": {"gather_s": 9999, "write_s": 9999, "bucket_s": 1},
    **dict.fromkeys(("topk", "gtopk", "gtopk-tree"), {"select_s": 9999, "write_s": 9999, "bucket_s": 1}),
}
ON_CORES = ("reduce_s", "merge_s", "select_s", "gather_s", "write_s", "bucket_s", "dense_bucket_s")


@pytest.mark.parametrize("scheme, world_size", BY_HAND)
def test_terms_counted_by_hand(scheme, world_size):
    exchange = BY_HAND[scheme, world_size]
    assert exchange_terms(scheme, 9999, 100, world_size) == pytest.approx(exchange)
    step = exchange | PASSES[scheme]
    assert step_terms(scheme, 9999, 100, world_size) == pytest.approx(step)
    crowded = {name: 3 * factor if name in ON_CORES else factor for name, factor in step.items()}
    assert step_terms(scheme, 9999, 100, world_size, crowding=3.0) == pytest.approx(crowded)


@pytest.mark.parametrize("world_size", (2, 3, 4, 5, 8))
@pytest.mark.parametrize("numel", (70_000, 256 * 100, 10))
@pytest.mark.parametrize("bits", (1, 2, 4, 8))
def test_low_bit_bytes_are_what_a_rank_sends_at_most(bits, numel, world_size):
    """A chunk is at most a block larger than another one."""

    def exchange(transport):
        begin, end = chunks(numel, world_size)[transport.rank]
        before = transport.counters.bytes_sent
        x, owned = torch.ones(numel), torch.zeros(end - begin)
        LowBit(bits, transport).mean(transport, x, owned, False, Context(0, 0))
        return transport.counters.bytes_sent - before

    sent = max(in_process.run(world_size, exchange))
    path = exchange_terms(f"lowbit{bits}", numel, 0, world_size)["byte_s"]
    assert sent <= path <= sent + world_size * (32 * bits + 2)


def test_low_bit_terms_counted_by_hand():
    """2,560,000 elements are 10,000 blocks of 256: with 4 ranks and 4 bits a chunk has 640,000 and 325,016 bytes."""
    terms = {
        "message_s": 3,
        "ring_step_s": 3,
        "byte_s": 6 * 325_016,
        "encode_s": 3_200_000,
        "decode_s": 5_120_000,
    }
    assert exchange_terms("lowbit4", 2_560_000, 0, 4) == terms
    passes = {"gather_s": 2_560_000, "write_s": 2_560_000, "bucket_s": 1}
    assert step_terms("lowbit4", 2_560_000, 0, 4) == terms | passes
    crowded = exchange_terms("lowbit4", 2_560_000, 0, 4, crowding=2.0)
    assert crowded == terms | {"encode_s": 6_400_000, "decode_s": 10_240_000}
    # a chunk of 25,600 elements in 1 bit: 16 + 200 + 3,200 bytes, which are all-gathered by doubling
    assert exchange_terms("lowbit1", 102_400, 0, 4) == {
        "message_s": 3 + 2,
        "byte_s": 6 * 3416,
        "encode_s": 128_000,
        "decode_s": 204_800,
    }
    assert exchange_terms("lowbit4", 1000, 0, 1) == {}
    c = costs(encode_s=1e-9, decode_s=1e-9)
    one = exchange_s(c, "lowbit1", 2_560_000, 0, 4)
    assert periodic_averaging_s(c, 2_560_000, 4, 4, scheme="lowbit1") == pytest.approx(one / 4)


def test_small_all_gathers_of_a_power_of_two_go_by_doubling():
    k = (DOUBLING_BYTES - 16) // 8
    assert exchange_terms("topk", 10**6, k, 8) == {"message_s": 3, "byte_s": 7 * 32768}
    assert exchange_terms("topk", 10**6, k + 1, 8) == {"ring_step_s": 7, "byte_s": 7 * 32776}
    assert exchange_terms("topk", 10**6, k, 6) == {"ring_step_s": 5, "byte_s": 5 * 32768}


def test_small_all_reduces_of_a_power_of_two_go_by_doubling():
    n = DOUBLING_BYTES // 4 - 1  # and the vote
    assert DOUBLING_BYTES == 32768
    assert exchange_terms("dense", n, 0, 8) == {"message_s": 3, "byte_s": 3 * 32768, "reduce_s": 3 * 8192}
    assert exchange_terms("randomk", 10**6, n, 8) == exchange_terms("dense", n, 0, 8)
    for scheme, numel, k, world_size in (
        ("dense", n + 1, 0, 8),
        ("randomk", 10**6, n + 1, 8),
        ("dense", n, 0, 6),
    ):
        terms = exchange_terms(scheme, numel, k, world_size)
        assert "message_s" not in terms and terms["ring_step_s"] == 2 * (world_size - 1)


@pytest.mark.parametrize("world_size", RANKS)
def test_rounds(world_size):
    rounds, folds = core_rounds(world_size)
    assert rounds == math.floor(math.log2(world_size)) and folds == (math.log2(world_size) % 1 > 0)
    doubling = exchange_terms("gtopk", 10**6, 1000, world_size)
    tree = exchange_terms("gtopk-tree", 10**6, 1000, world_size)
    if world_size == 1:
        assert doubling == tree == {}
        return
    assert doubling["message_s"] == rounds + 2 * folds
    assert tree["message_s"] == 2 * rounds + 2 * folds
    assert doubling["merge_s"] == tree["merge_s"] == (rounds + folds) * 2 * 1000


def test_terms_are_linear_and_complete():
    names = {name for scheme in SCHEMES for name in step_terms(scheme, 10**6, 1000, 6)}
    assert names == set(Costs.__dataclass_fields__)
    c = costs()
    for scheme in SCHEMES:
        terms = step_terms(scheme, 10**6, 1000, 6)
        assert step_s(c, scheme, 10**6, 1000, 6) == pytest.approx(
            sum(getattr(c, n) * f for n, f in terms.items())
        )


def test_orders_of_growth():
    c = costs()
    numel, k = 25_557_032, 25_558
    at = {s: [exchange_s(c, s, numel, k, p) for p in (8, 64, 1024)] for s in SCHEMES}
    assert at["topk"][2] > 20 * at["topk"][0]  # linear in P
    assert at["gtopk"][2] < 4 * at["gtopk"][0]  # logarithmic
    assert all(g < t for g, t in zip(at["gtopk"], at["gtopk-tree"]))
    assert at["gtopk"][0] < at["topk"][0]
    assert periodic_averaging_s(c, numel, 8, 8) == pytest.approx(at["dense"][0] / 8)


def by_definition(cost, buckets, backward_s):
    """docs/cost-model.md, bucket after bucket."""
    end = 0.0
    for i in range(buckets):
        end = max(end, backward_s * (i + 1) / buckets) + cost
    return end - backward_s


def test_exposed_time():
    assert exposed_s(1.0, 10, 0.0) == 10.0
    assert exposed_s(0.5, 10, 10.0) == pytest.approx(0.5)  # each hides behind the next part of backward
    assert exposed_s(2.0, 10, 10.0) == pytest.approx(11.0)
    for buckets in (1, 2, 7):
        for backward_s in (0.0, 0.3, 5.0, 100.0):
            for cost in (0.0, 0.1, 1.0):
                expected = by_definition(cost, buckets, backward_s)
                assert exposed_s(cost, buckets, backward_s) == pytest.approx(expected)


@pytest.mark.parametrize(
    "call",
    (
        lambda: exchange_terms("top-k", 1, 1, 2),
        lambda: exchange_terms("topk", -1, 1, 2),
        lambda: exchange_terms("topk", 1, 1, 0),
        lambda: exchange_terms("topk", 1, 1, 2, crowding=0.0),
        lambda: exposed_s(1.0, 0, 0.0),
        lambda: exposed_s(1.0, 1, -1.0),
        lambda: exposed_s(1.0, 1, float("nan")),
        lambda: exposed_s(1.0, 1, float("inf")),
        lambda: periodic_averaging_s(costs(), 1, 2, 0),
        lambda: costs(mbit=-1.0),
        lambda: costs(merge_s=float("nan")),
    ),
)
def test_bad_arguments(call):
    with pytest.raises(ValueError):
        call()
