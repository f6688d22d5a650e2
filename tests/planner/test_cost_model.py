"""The cost model against counts made by hand and by the transports themselves; choices that follow from it."""

import math
from dataclasses import replace

import pytest
import torch

from commhooks import AllGather, GTopK, RandomK, SharedIndices, SparseGrad, TopK
from commhooks.aggregators import Context
from commhooks.planner import Costs, choose, exchange_s, step_s
from commhooks.planner.choice import BUCKET_MB, CANDIDATES
from commhooks.planner.cost_model import (
    SCHEMES,
    core_rounds,
    exchange_terms,
    exposed_s,
    periodic_averaging_s,
    step_terms,
)
from commhooks.transports import in_process

RANKS = (1, 2, 3, 4, 5, 6, 7, 8, 16, 33, 64, 1024)


def costs(mbit=1000.0, alpha=1e-4, **others):
    """A plausible CPU cluster at `mbit` Mbit/s."""
    base = Costs(alpha, 8e-6 / mbit, alpha / 2, 2e-10, 3e-8, 1e-9, 4e-10, 4e-10, 2e-4)
    return replace(base, **others)


@pytest.mark.parametrize("world_size", (2, 3, 4, 5, 6, 7, 8))
@pytest.mark.parametrize("scheme", ("topk", "gtopk", "gtopk-tree", "randomk"))
def test_bytes_are_what_a_rank_sends_at_most(scheme, world_size):
    """The tree's way back is serial, so its path is longer than what one rank sends; all others are equal."""
    k, numel = 100, 5000

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
        aggregator.aggregate(pairs, False, Context(0, 0))
        return transport.counters.bytes_sent - before

    sent = max(in_process.run(world_size, exchange))
    path = exchange_terms(scheme, numel, k, world_size)["byte_s"]
    if scheme == "gtopk-tree" or (scheme == "gtopk" and world_size & (world_size - 1)):
        assert (
            sent <= path <= 2 * sent + 8 * k + 16 + k
        )  # fold in and out are waited for, sent by different ranks
    else:
        assert path == pytest.approx(sent, abs=8)


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


def test_exposed_time():
    assert exposed_s([1.0] * 10, 0.0) == 10.0
    assert exposed_s([0.5] * 10, 10.0) == pytest.approx(0.5)  # each hides behind the next part of backward
    assert exposed_s([2.0] * 10, 10.0) == pytest.approx(11.0)
    assert exposed_s([], 3.0) == 0.0


@pytest.mark.parametrize(
    "call",
    (
        lambda: exchange_terms("top-k", 1, 1, 2),
        lambda: exchange_terms("topk", -1, 1, 2),
        lambda: exchange_terms("topk", 1, 1, 0),
        lambda: exchange_terms("topk", 1, 1, 2, crowding=0.0),
        lambda: exposed_s([1.0], -1.0),
        lambda: periodic_averaging_s(costs(), 1, 2, 0),
        lambda: costs(mbit=-1.0),
        lambda: costs(merge_s=float("nan")),
        lambda: choose(costs(), 0, 2),
        lambda: choose(costs(), 10, 2, densities=[]),
        lambda: choose(costs(), 10, 2, densities=[1.5]),
    ),
)
def test_bad_arguments(call):
    with pytest.raises(ValueError):
        call()


def test_a_slow_network_is_compressed_and_a_fast_one_is_not():
    slow = choose(costs(mbit=100), 25_557_032, 4)
    assert slow.scheme in ("gtopk", "topk") and slow.bucket_mb in BUCKET_MB
    assert "times less than dense" in slow.reason
    fast = choose(costs(mbit=1_000_000, alpha=1e-6, select_s=2e-9), 25_557_032, 4)
    assert fast.scheme == "dense" and fast.reason.startswith("do not compress")
    assert choose(costs(mbit=100), 25_557_032, 1).scheme == "dense"
    assert choose(costs(mbit=10_000), 100, 4).scheme == "dense"


def test_many_ranks_take_gtopk():
    assert choose(costs(mbit=100), 25_557_032, 64, densities=[0.001]).scheme == "gtopk"


def test_the_denser_of_two_equals_is_taken():
    c = costs(mbit=10_000, alpha=1e-3)
    plan = choose(c, 1_000_000, 2, densities=[0.01, 0.001])
    assert plan.scheme == "dense" or plan.density == 0.01


def test_the_rule_for_buckets_sends_small_ones_densely():
    plan = choose(costs(mbit=100), 25_557_032, 8)
    assert not plan(6_000_000, 6_000, 8)
    assert plan(100, 1, 2)
    dense = choose(costs(mbit=1_000_000, alpha=1e-6, select_s=2e-9), 25_557_032, 4)
    assert dense(6_000_000, 6_000, 4)


def test_predictions_are_sorted_and_cover_the_candidates():
    plan = choose(costs(mbit=100), 1_000_000, 8)
    times = [p.step_s for p in plan.predictions]
    assert times == sorted(times)
    assert {p.scheme for p in plan.predictions} == {"dense", *CANDIDATES}


def test_plans_read_alike_on_all_ranks():
    """They are part of the settings that ranks compare."""
    one, other = (choose(costs(mbit=100), 1_000_000, 8) for _ in range(2))
    assert repr(one) == repr(other) and "0x" not in repr(one)


def test_selector_and_aggregator_of_a_plan():
    from commhooks.planner.auto import configured

    plan = choose(costs(mbit=100), 1_000_000, 8)
    for scheme, kinds in (
        ("topk", (TopK, AllGather)),
        ("gtopk", (TopK, GTopK)),
        ("randomk", (RandomK, SharedIndices)),
    ):
        selector, aggregator = configured(replace(plan, scheme=scheme), "distributed")
        assert (type(selector), type(aggregator)) == kinds
