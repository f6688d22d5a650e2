"""A density that changes in mid-run: alike on all ranks it takes effect, on one rank it is a typed error."""

import pytest
import torch
from launch import spawn_gloo
from ranks import ALL_SCHEMES, reducer

from commhooks import Bucket, ExponentialWarmup, SettingsMismatchError
from commhooks.reduction.sizes import Sizes
from commhooks.selection.density import DensitySchedule, as_schedule
from commhooks.selection.selectors import TopK
from commhooks.transports.distributed import DistributedTransport

N = 2000
SCHEMES = sorted(set(ALL_SCHEMES) - {"dense"})


class Odd(DensitySchedule):
    """Falls at step 3, on one rank deeper than on the others."""

    def __init__(self, low):
        self.low = low

    def density(self, step):
        return 0.1 if step < 3 else self.low

    def __repr__(self):
        return "Odd"  # the same on all ranks, so that the agreement does not tell


def step(red):
    pairs, aggregate = [], red.aggregator.aggregate

    def counted(transport, selected, *rest):
        pairs.append(selected.k)
        return aggregate(transport, selected, *rest)

    red.aggregator.aggregate = counted
    generator = torch.Generator().manual_seed(red.transport.rank) if red.connection.is_open else None
    red.reduce(Bucket(0, torch.randn(N, generator=generator), ("p",), (N,)))
    red.aggregator.aggregate = aggregate
    return pairs


def _assigned(rank, size, how):
    """By scheme: pairs sent at each step, and the error if there is one."""
    outcome = {}
    for scheme in SCHEMES:
        transport = DistributedTransport(timeout_s=20.0)
        options = {"dense_crossover": lambda numel, k, p: k == 200} if how == "dense" else {}
        red = reducer(scheme, transport, 0.1, **options)
        if how == "schedule":
            red.selector.schedule = Odd(0.05 if rank == 1 else 0.02)
        sent, error = [], None
        try:
            for number in range(5):
                if number == 2 and how != "schedule" and (how == "all" or rank == 1):
                    red.selector.schedule = as_schedule(0.02)
                sent += step(red)
        except SettingsMismatchError as raised:
            error = str(raised)
        outcome[scheme] = sent, error
        transport.close()
    return outcome


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("how", ["one", "schedule", "dense"])
def test_one_rank_that_sends_another_number_of_pairs_is_told_everywhere(ranks, how):
    """gloo ended the process: a message of another size than its receiver expects."""
    there, here = (100, 40) if how == "schedule" else (40, 200)
    others = {2: "rank 0", 3: "ranks 0, 2", 4: "ranks 0, 2, 3"}[ranks]
    told = f"rank 1, bucket 0, step 2: the ranks disagree on pairs at the next step: {there} here, {here} on {others}"
    for rank, outcome in enumerate(spawn_gloo(_assigned, ranks, (how,))):
        for scheme, (sent, error) in outcome.items():
            assert sent == [200] * (0 if how == "dense" else 2), (scheme, rank, sent)
            assert error is not None and f"pairs at the next step: {(here, there)[rank == 1]} here" in error
            assert f"{there} on rank 1" in error or error == told, (scheme, rank, error)


def test_alike_on_all_ranks_it_takes_effect_a_step_later():
    for outcome in spawn_gloo(_assigned, 3, ("all",)):
        assert outcome == {scheme: ([200] * 3 + [40] * 2, None) for scheme in SCHEMES}


def test_a_schedule_is_followed_and_a_step_done_again_is_the_same():
    schedule, sizes = ExponentialWarmup(0.01, warmup_steps=4), Sizes()
    selector = TopK(schedule)
    for now in (0, 1, 2, 2, 3, 4):
        k, following = sizes.at(selector, 0, N, now, is_new=now == 0)
        assert (k, following) == (selector.k(N, now), selector.k(N, now + 1))
    selector.schedule = as_schedule(0.5)
    assert sizes.at(selector, 0, N, 5, is_new=False) == (20, 1000)
    assert sizes.at(selector, 0, N, 5, is_new=True) == (1000, 1000)
    assert Sizes().at(selector, 0, N, 5, is_new=False) == (1000, 1000)
