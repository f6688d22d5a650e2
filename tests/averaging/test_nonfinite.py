"""NaN and Inf on one rank, by policy, in every averager, with and without a reducer."""

import logging

import pytest
import torch

from commhooks.errors import NonFiniteGradientError
from commhooks.transports import in_process

from .test_membership import COMPRESSED, KINDS, make, parameters


def run(kind, bad_ranks, world_size, **options):
    """One synchronisation after one step of size rank; the parameters, or the error, by rank."""

    def work(transport):
        params = parameters(0, 0)
        optimizer = torch.optim.SGD(params, lr=1.0, momentum=0.5)
        averager = make(kind, params, transport, 1, optimizer, **options)
        for p in params:
            p.grad = torch.full_like(p, -float(transport.rank))
        optimizer.step()
        if transport.rank in bad_ranks:
            params[1].data[0] = torch.inf if transport.rank % 2 else torch.nan
        before = [p.tolist() for p in params]
        try:
            averager.average_parameters(params)
        except NonFiniteGradientError as error:
            assert [p.tolist() for p in params] == before or any(x != x for p in params for x in p.tolist())
            return error
        return torch.cat([p.detach() for p in params])

    return in_process.run(world_size, work)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", ({}, {"nonfinite": "error"}))
def test_it_is_an_error_on_all_ranks_and_nothing_is_averaged(kind, options):
    for error in run(kind, {1}, 3, **options):
        assert isinstance(error, NonFiniteGradientError)
        assert "after step 1" in str(error) and "ranks [1]; nothing was averaged" in str(error)


@pytest.mark.parametrize("kind", KINDS + COMPRESSED)
def test_skip_leaves_those_ranks_out_and_gives_them_the_average(kind, caplog):
    with caplog.at_level(logging.WARNING):
        results = run(kind, {1}, 3, nonfinite="skip")
    mean = 1.0  # of 0 and 2; through a reducer rank 1 counts as not moved: (0 + 0 + 2) / 3
    expected = 2 / 3 if "topk" in kind else mean
    # complete graph, a third each: x_p + sum_j (x_j - x_p) / 3 over the good ones, from 0, their mean, and 2
    mixed = [2 / 3, 1.0, 4 / 3]
    for rank, result in enumerate(results):
        value = mixed[rank] if kind == "decentralized" else expected
        assert result.tolist() == pytest.approx([value] * 4)
    assert any("ranks [1], which are left out" in r.message for r in caplog.records)


@pytest.mark.parametrize("kind", KINDS + COMPRESSED)
def test_when_no_rank_is_left_it_is_an_error(kind):
    for error in run(kind, {0, 1}, 2, nonfinite="skip"):
        assert isinstance(error, NonFiniteGradientError)


@pytest.mark.parametrize("kind", KINDS + COMPRESSED)
def test_propagate_spreads_it(kind):
    for result in run(kind, {1}, 2, nonfinite="propagate"):
        assert not result.isfinite().all()


@pytest.mark.parametrize("kind", COMPRESSED)
def test_error_comes_before_the_reducer_too(kind):
    for error in run(kind, {1}, 2, nonfinite="error"):
        assert "nothing was averaged" in str(error)


def test_other_policies_are_refused():
    with pytest.raises(ValueError, match="nonfinite must be one of .*'error'.*, got 'ignore'"):
        make("local", parameters(0), in_process.group(1)[0], nonfinite="ignore")


@pytest.mark.parametrize("kind", ("restarted", "decentralized"))
def test_momentum_buffers_are_looked_at(kind):
    def work(transport):
        params = parameters(0)
        optimizer = torch.optim.SGD(params, lr=0.0, momentum=0.5)
        averager = make(kind, params, transport, 1, optimizer)
        params[0].grad = torch.full_like(params[0], torch.inf if transport.rank else 1.0)
        optimizer.step()
        params[0].data.zero_()
        with pytest.raises(NonFiniteGradientError, match=r"ranks \[1\]"):
            averager.average_parameters(params)

    in_process.run(2, work)


def test_large_numbers_whose_sum_overflows_are_finite():
    params = [torch.nn.Parameter(torch.full((3,), 3e38))]
    make("local", params, in_process.group(1)[0], 1).average_parameters(params)
    assert params[0].isfinite().all()
