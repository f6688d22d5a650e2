"""Which plan follows from which costs, and the thresholds it turns at."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from launch import ROOT

from commhooks import AllGather, GTopK, RandomK, SharedIndices, TopK
from commhooks.planner import Costs, Job, command, settle
from commhooks.planner import choose as choose_for
from commhooks.planner.plan import ADAPTIVE, BUCKET_MB, CANDIDATES, EQUAL, LEAST_SAVING_S, MARGIN, SAFE
from commhooks.schemes import make_parts

BUSY = json.loads((Path(__file__).parent / "busy_starts.json").read_text())
"""The costs, `Costs` without low bit, that `SparseState.auto` measured in 20 starts, three times each.

2 ranks over gloo on two cores that four other processes kept busy, a model of 262,656 parameters.
"""
MB = 1 << 18  # elements


def costs(mbit=1000.0, alpha=1e-4, **others):
    """A plausible CPU cluster at `mbit` Mbit/s."""
    base = Costs(alpha, 8e-6 / mbit, alpha / 2, 2e-10, 3e-8, 1e-9, 4e-10, 4e-10, 2e-4, 1e-4)
    return replace(base, **others)


def choose(costs, numel, world_size, **job):
    """One measurement's plan for a job of so many parameters, which allows two densities unless told otherwise."""
    return choose_for(costs, Job(numel, **{"densities": (0.01, 0.001), **job}), world_size)


def free(**others):
    """Nothing costs anything but what is named: a bucket of either kind has a price of its own."""
    return Costs(**(dict.fromkeys(Costs.__dataclass_fields__, 0.0) | others))


def prices(dense_s, sparse_s, **others):
    """Per bucket."""
    return free(dense_bucket_s=dense_s, bucket_s=sparse_s, **others)


@pytest.mark.parametrize(
    "call",
    (
        lambda: choose(costs(), 0, 2),
        lambda: choose(costs(), 10, 2, densities=()),
        lambda: choose(costs(), 10, 2, densities=(1.5,)),
        lambda: choose(costs(), 10, 2, backward_s=-1.0),
        lambda: choose(costs(), 10, 2, backward_s=math.nan),
        lambda: choose(costs(), 10, 2, backward_s=math.inf),
        lambda: choose(costs(), 10, 2, bucket_mb=()),
        lambda: choose(costs(), 10, 2, bucket_mb=(0.0,)),
        lambda: choose(costs(), 10, 2, schemes=("top-k",)),
    ),
)
def test_bad_arguments(call):
    with pytest.raises(ValueError):
        call()


def test_compression_must_promise_the_margin():
    sparse_s = 0.1  # saves far more than the least
    for dense_s, pays in ((MARGIN * sparse_s * 1.0001, True), (MARGIN * sparse_s * 0.9999, False)):
        assert (choose(prices(dense_s, sparse_s), 1000, 2).scheme != "dense") == pays


def test_compression_must_save_a_least_time():
    for saving, pays in ((LEAST_SAVING_S * 1.001, True), (LEAST_SAVING_S * 0.999, False)):
        assert (choose(prices(1e-4 + saving, 1e-4), 1000, 2).scheme != "dense") == pays


def test_backward_hides_what_would_have_been_saved():
    """4 buckets: of sparse ones the last shows (10 ms), of dense ones 56 ms less 3/4 of backward."""
    c, numel = prices(0.014, 0.010), 100 * MB
    just = (0.056 - MARGIN * 0.010) * 4 / 3
    for backward_s, pays in ((just * 0.9999, True), (just * 1.0001, False)):
        plan = choose(c, numel, 2, backward_s=backward_s, bucket_mb=(25.0,))
        assert (plan.scheme != "dense") == pays


def test_the_largest_parameter_is_never_split():
    """It makes one bucket of four, in which four dense ones cost enough to compress."""
    c, numel = prices(0.0015, 0.0005), 100 * MB
    assert choose(c, numel, 2, bucket_mb=(25.0,)).scheme != "dense"
    assert choose(c, numel, 2, bucket_mb=(25.0,), largest_numel=25 * MB).scheme != "dense"
    assert choose(c, numel, 2, bucket_mb=(25.0,), largest_numel=100 * MB).scheme == "dense"


def test_ddps_default_bucket_size_unless_another_is_a_quarter_faster():
    """100 MB in all: 4 buckets or 1, beside a pass that costs the same for both."""
    numel = 100 * MB
    assert EQUAL == 1.25
    for passes, expected in ((11.1, 25.0), (10.9, 100.0)):  # (passes + 4) / (passes + 1) around 1.25
        c = prices(0.001, 1.0, write_s=passes * 0.001 / numel)
        plan = choose(c, numel, 2)
        assert plan.scheme == "dense" and plan.bucket_mb == expected
    assert choose(free(), numel, 2).bucket_mb == 25.0  # all equal


def test_dense_does_not_want_small_buckets():
    plan = choose(costs(mbit=10_000), 25_557_032, 4, schemes=())
    assert plan.summary() == "dense all-reduce, bucket_cap_mb=25"


def test_what_sends_less_must_be_the_margin_faster_at_every_step_down():
    """1000 elements, 2 ranks, 1 s a bucket and 1 s a merged pair: gTop-k merges 20 pairs at 0.01 and 2 at 0.001."""
    sparse = {"topk": 1.0, ("gtopk", 0.01): 1.0 + 20.0, ("gtopk", 0.001): 1.0 + 2.0}
    c = prices(100.0, sparse["topk"], merge_s=1.0)
    for dense_s, schemes, taken in (
        (100.0, ("topk", "gtopk"), ("topk", 0.01)),
        (100.0, ("gtopk",), ("gtopk", 0.001)),
        (21.0 * MARGIN * 0.999, ("gtopk",), ("gtopk", 0.001)),
        (3.0 * MARGIN * 0.999, ("gtopk",), ("dense", 1.0)),
    ):
        plan = choose(replace(c, dense_bucket_s=dense_s), 1000, 2, schemes=schemes)
        assert (plan.scheme, plan.density) == taken
    for merge_s, density in (
        ((MARGIN - 1) / (20 - 2 * MARGIN) * 0.999, 0.01),
        ((MARGIN - 1) / (20 - 2 * MARGIN) * 1.001, 0.001),
    ):
        plan = choose(prices(100.0, 1.0, merge_s=merge_s), 1000, 2, schemes=("gtopk",))
        assert plan.density == density


def test_top_k_rather_than_gtopk_unless_that_is_the_margin_faster():
    """At 4 ranks top-k receives 3 messages and gTop-k 2: 1.5 times as many, less for the headers. At 8 ranks 7 and 3."""
    byte_s = 1e-3
    for world_size, scheme in ((2, "topk"), (4, "topk"), (8, "gtopk")):
        plan = choose(prices(1e3, 1e-3, byte_s=byte_s), 10**6, world_size, densities=(0.001,))
        assert plan.scheme == scheme, world_size


def test_random_k_is_not_taken_untold_and_only_when_no_other_pays():
    """A selection that costs: random-k's is cheaper, and top-k either pays or does not."""
    numel, dense_s = 1000, 0.100
    for selection, told in ((dense_s / MARGIN * 0.999, "topk"), (dense_s / MARGIN * 1.001, "randomk")):
        c = prices(dense_s, 0.0, select_s=selection / numel, gather_s=0.030 / numel)
        plan = choose(c, numel, 2, schemes=("topk", "randomk"))
        assert plan.scheme == told
        assert plan.predictions[0].scheme == "randomk"
        untold = choose(c, numel, 2)
        assert untold.scheme == ("topk" if told == "topk" else "dense")
        assert untold.predictions[0].scheme == "randomk" and "randomk" not in untold.reason


def test_the_candidates_are_in_order_also_by_their_old_name():
    job = Job(1000, schemes=("randomk", "gtopk", "topk"), densities=(0.001, 0.01))
    expected = [(s, d) for d in (0.01, 0.001) for s in ("topk", "gtopk")] + [
        ("randomk", 0.01),
        ("randomk", 0.001),
    ]
    assert job.candidates() == expected
    with pytest.warns(DeprecationWarning, match="now called candidates"):
        assert job.ladder() == expected


def test_few_bits_are_for_other_optimizers_than_sgd():
    """Only bytes cost. Of an element 2 ranks send 4 bytes, 1.01 in 8 bits, 0.51 in 4 bits, and 0.08 by top-k."""
    c, numel = free(byte_s=1e-6), 10**6
    for schemes, taken in (
        (SAFE, ("topk", 0.01)),
        (ADAPTIVE, ("lowbit4", 1.0)),
        (("lowbit8",), ("lowbit8", 1.0)),
        ((*SAFE, *ADAPTIVE), ("topk", 0.01)),
    ):
        plan = choose(c, numel, 2, schemes=schemes, densities=(0.01,))
        assert (plan.scheme, plan.density) == taken, schemes
        assert {p.scheme for p in plan.predictions} == {"dense", *CANDIDATES}
    plan = choose(c, numel, 2, schemes=ADAPTIVE)
    assert plan.bits == 4 and plan.summary() == "lowbit, 4 bits an element, bucket_cap_mb=25"
    assert plan.faster_if_allowed().density == 0.001  # a sparse scheme
    assert choose(c, numel, 2, schemes=SAFE).bits is None
    # 4 bits must be the margin faster than 8, and either than dense. 1.5 elements are coded for each.
    for encode, taken in ((0.0, "lowbit4"), (0.5, "lowbit8"), (1.6, "dense")):
        found = choose(replace(c, encode_s=encode * 1e-6), numel, 2, schemes=ADAPTIVE)
        assert found.scheme == taken, encode
    assert "do not compress" in found.reason and "density" not in found.reason


def test_the_averagers_prediction_of_one_bit_every_4_steps():
    c, numel = free(byte_s=1e-6), 2_560_000
    plan = choose(c, numel, 4, schemes=ADAPTIVE)
    assert plan.averaging_s == pytest.approx(6 * (16 + 5000 + 80_000) * 1e-6 / 4)
    assert choose(c, numel, 1).averaging_s == 0.0


def test_what_is_taken_promises_the_margin_itself():
    """Not only the fastest: only random-k pays, and of its densities only one."""
    numel = 1000
    # 10 pairs would be within 10 % of the fastest, and do not pay: 44 bytes and 8 beside a second for the pass.
    byte_s = 1e-4
    dense_s = MARGIN * (1.0 + 26 * byte_s) - 4004 * byte_s
    c = prices(dense_s, 0.0, select_s=1.0, gather_s=1.0 / numel, byte_s=byte_s)
    plan = choose(c, numel, 2, schemes=("topk", "randomk"))
    assert (plan.scheme, plan.density) == ("randomk", 0.001)


def test_what_was_not_allowed_is_shown_and_not_taken():
    """A density of 0.001, and random-k. A network this slow would gain by both."""
    plan = choose_for(costs(mbit=10), Job(25_557_032), 4)
    assert (plan.scheme, plan.density) == ("topk", 0.01)
    assert {(p.scheme, p.density) for p in plan.predictions} >= {("topk", 0.001), ("randomk", 0.01)}
    faster = plan.faster_if_allowed()
    assert faster.density == 0.001 and faster.step_s * MARGIN < plan.predictions[-1].step_s
    told = choose_for(costs(mbit=10), Job(25_557_032, densities=(0.01, 0.001), schemes=CANDIDATES), 4)
    assert told.density == 0.001 and told.faster_if_allowed() is None


def test_noise_falls_to_the_side_of_dense():
    """Three measurements around a limit: what is closest to dense wins, and says that it was close."""
    pays = choose(prices(MARGIN * 0.1001, 0.1), 1000, 2)
    does_not = choose(prices(MARGIN * 0.0999, 0.1), 1000, 2)
    assert (pays.scheme, does_not.scheme) == ("topk", "dense")
    for order in ([pays, pays, does_not], [does_not, pays, pays], [pays, does_not, does_not]):
        settled = settle(order)
        assert settled.scheme == "dense" and settled.reason.startswith("too close to call: dense. ")
        assert f"{sum(p is pays for p in order)} of 3 measurements say topk at density 0.01" in settled.reason
    assert settle([pays, pays]) == pays and settle([does_not] * 3) == does_not
    sparser = replace(pays, scheme="gtopk", density=0.001)
    settled = settle([sparser, pays])
    assert (settled.scheme, settled.density) == ("topk", 0.01) and "too close to call" in settled.reason
    other_size = replace(pays, bucket_mb=1.0)
    assert settle([other_size, pays]).bucket_mb == 25.0 and settle([other_size, pays]).reason == pays.reason


def test_twenty_starts_on_a_busy_machine_choose_alike():
    """Each one's plan closest to dense was top-k in some starts and dense in the others."""
    before, settled = [], []
    for start in BUSY:
        job = Job(262_656)
        before.append({choose_for(Costs(*found), job, 2).scheme for found in start})
        # As the probe gives them: a dense bucket's constant, the tenth, is not above a sparse one's.
        bounded = [Costs(*found[:9], min(found[8:10])) for found in start]
        settled.append(settle([choose_for(found, job, 2) for found in bounded]))
    assert len(settled) == 20 and {plan.scheme for plan in settled} == {"dense"}
    assert all(plan.bucket_mb == 25.0 for plan in settled)
    noisy = [plan.reason for plan in settled if "By 3 measurements" in plan.reason]
    assert noisy and all(reason.startswith("too close to call: dense. ") for reason in noisy)
    alone = sum(schemes == {"topk"} for schemes in before)
    assert 0 < alone < 20
    page = " ".join((ROOT / "docs" / "cost-model.md").read_text().split())
    assert f"all three plans said top-k in {alone} of 20 starts" in page


def test_what_pays_by_more_than_the_measurements_differ_is_taken():
    """A plan that pays needs a factor of MARGIN, and one of MARGIN times the spread where there is one."""
    for spread, factor, taken in (
        (1.0, MARGIN * 1.01, "topk"),
        (2.0, 2.0 * MARGIN * 0.99, "dense"),
        (2.0, 2.0 * MARGIN * 1.01, "topk"),
    ):
        plans = [choose(prices(1.0 * slower, 1.0 / factor), 1000, 2) for slower in (1.0, spread, 1.0)]
        assert {plan.scheme for plan in plans} == {"topk"}
        assert settle(plans).scheme == taken, (spread, factor)
    assert (
        "By 3 measurements dense takes 1e+03 ms to 2e+03 ms per step, topk at density 0.01 337 ms to 337 ms"
        in (settle([choose(prices(slower, 1.0 / 2.97), 1000, 2) for slower in (1.0, 2.0, 1.0)]).reason)
    )


def test_measurements_that_differ_are_told():
    steady = choose(costs(mbit=100), 25_557_032, 4)
    disturbed = choose(costs(mbit=40), 25_557_032, 4)
    assert settle([steady, steady]).spread == 1.0
    settled = settle([steady, disturbed, steady])
    assert 2.0 < settled.spread < 2.6
    assert "differ by a factor of 2." in command.text(settled, "distributed")
    assert "differ" not in command.text(steady, "distributed")
    assert command.as_dict(settled, "distributed")["spread"] == settled.spread


def test_a_plan_prints_as_a_sentence():
    plan = choose(costs(mbit=100), 25_557_032, 8)
    assert str(plan).startswith("25,557,032 parameters on 8 ranks: gtopk at density") and "\n" not in str(
        plan
    )
    assert "times less than dense" in str(plan)
    assert plan.table().count("\n") == 2 + len(plan.predictions)


def test_no_scheme_allowed():
    plan = choose(costs(mbit=100), 25_557_032, 4, schemes=())
    assert plan.scheme == "dense" and "no scheme" in plan.reason


def test_a_slow_network_is_compressed_and_a_fast_one_is_not():
    slow = choose(costs(mbit=100), 25_557_032, 4)
    assert slow.scheme in ("gtopk", "topk") and slow.bucket_mb in BUCKET_MB
    assert "times less than dense" in slow.reason
    fast = choose(costs(mbit=1_000_000, alpha=1e-6, select_s=2e-9), 25_557_032, 4)
    assert fast.scheme == "dense" and fast.reason.startswith("do not compress")
    assert choose(costs(mbit=100), 25_557_032, 1).scheme == "dense"
    assert choose(costs(mbit=10_000), 100, 4).scheme == "dense"


def test_many_ranks_take_gtopk():
    assert choose(costs(mbit=100), 25_557_032, 64, densities=(0.001,)).scheme == "gtopk"


def test_the_rule_for_buckets():
    """Bucket by bucket: dense where its own price is lower, a pass through the memory included."""
    plan = choose(costs(mbit=100), 25_557_032, 8)
    assert not plan(6_000_000, 6_000, 8)
    assert plan(100, 1, 8) and plan(100, 1, 1)
    dense = choose(costs(mbit=1_000_000, alpha=1e-6, select_s=2e-9), 25_557_032, 4)
    assert dense.scheme == "dense" and dense(6_000_000, 6_000, 4)


def test_the_rule_for_buckets_turns_where_the_costs_meet():
    """2 ranks, top-k of 1 pair: 24 bytes against 4 (n + 1), and 0.5 ms more for the sparse bucket."""
    plan = choose(prices(0.5e-3, 1e-3, byte_s=1e-6), 10**6, 2, schemes=("topk",), densities=(0.001,))
    assert plan.scheme == "topk"
    assert plan(129, 1, 2) and not plan(131, 1, 2)  # 4 (n + 1) = 524 bytes at n = 130
    dearer = replace(plan, costs=replace(plan.costs, gather_s=1e-6))
    assert dearer(103, 1, 2) and not dearer(105, 1, 2)  # 5 n + 4 = 524 at n = 104


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
    plan = choose(costs(mbit=100), 1_000_000, 8)
    for scheme, kinds in (
        ("topk", (TopK, AllGather)),
        ("gtopk", (TopK, GTopK)),
        ("randomk", (RandomK, SharedIndices)),
    ):
        selector, aggregator, _ = make_parts(scheme, plan.density)
        assert (type(selector), type(aggregator)) == kinds
