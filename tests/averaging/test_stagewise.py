"""Stagewise M-DSGD against its simulation: stages, proximal term, fresh memory, averaged iterates."""

import pytest
import torch

from commhooks import AllGather, Bucket, ErrorFeedback, Reducer, TopK
from commhooks.averaging import Stagewise
from commhooks.transports import in_process

from . import oracles
from .workers import NUMEL, Pieces, in_ranks, start

GAMMA, ETA0, BETA = 0.02, 0.08, 0.5


def make(transport, dtype=torch.float32, **options):
    model = Pieces(start(), dtype=dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=123.0)
    memory = ErrorFeedback(momentum=BETA)
    reducer = Reducer(TopK(0.3), AllGather(transport=transport), memory, dense_crossover=False)
    stages = Stagewise(optimizer, reducer, gamma=GAMMA, eta0=ETA0, **options)
    return model, optimizer, reducer, stages


def steps(parts, gradient, rank, count, first=0):
    """The gradient of penalty() by autograd plus the given one, through the reducer as by the hook."""
    model, optimizer, reducer, stages = parts
    history = []
    for t in range(first, first + count):
        history.append(model.flat())
        optimizer.zero_grad()
        stages.penalty().backward()
        flat = torch.cat([p.grad.reshape(-1) for p in model.parts]) + gradient(rank, t, model.flat()).float()
        reducer.reduce(Bucket(index=0, buffer=flat, keys=("a", "b"), numels=(6, 4), is_last=True))
        model.set_gradient(flat)
        optimizer.step()
        stages.step()
    return torch.stack([*history, model.flat()])


@pytest.mark.parametrize("world_size", (1, 2, 3, 4, 8))
def test_equals_its_simulation(world_size):
    lengths = [3, 6, 9]  # ceil(12 * 0.02 * (s + 1) / 0.08)
    gradient = oracles.make_gradient(world_size, sum(lengths), NUMEL)
    starts, iterates = oracles.stagewise(start(), gradient, world_size, lengths, BETA, ETA0, GAMMA, keep=3)

    def work(transport):
        parts = make(transport)
        history = steps(parts, gradient, transport.rank, sum(lengths))
        stages = parts[3]
        assert [stages.steps_of(s) for s in range(3)] == lengths
        assert (stages.stage, stages.stage_step) == (3, 0) and stages.rate == ETA0 / 4
        assert len(stages.withheld) == 3 and all(norm > 0 for norm in stages.withheld)
        assert parts[2].memory.table.residual_norm() == 0.0
        return history

    result = in_ranks(world_size, work)
    for rank in range(world_size):
        torch.testing.assert_close(result[:-1, rank], torch.stack(iterates), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result[-1, rank], starts[-1], rtol=1e-4, atol=1e-5)
        assert torch.equal(result[:, rank], result[:, 0])


@pytest.mark.parametrize("cut", (2, 3, 7))
def test_resumes_bit_for_bit(cut):
    gradient = oracles.make_gradient(2, 12, NUMEL)
    expected = in_ranks(2, lambda t: steps(make(t), gradient, t.rank, 12))

    def resumed(transport):
        first = make(transport)
        steps(first, gradient, transport.rank, cut)
        second = make(transport)
        second[0].load_state_dict(first[0].state_dict())
        second[1].load_state_dict(first[1].state_dict())
        second[2].load_state_dict(first[2].state_dict())
        second[3].load_state_dict(first[3].state_dict())
        return steps(second, gradient, transport.rank, 12 - cut, first=cut)

    assert torch.equal(in_ranks(2, resumed), expected[cut:])


def test_dense_runs_have_nothing_to_withhold():
    model = Pieces(start())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    stages = Stagewise(optimizer, gamma=GAMMA, eta0=ETA0, stage_steps=lambda s: 10)
    ended = []
    for _ in range(20):
        optimizer.zero_grad()
        (sum(p.square().sum() for p in model.parameters()) + stages.penalty()).backward()
        optimizer.step()
        ended.append(stages.step())
    assert [i + 1 for i, end in enumerate(ended) if end] == [10, 20] and stages.withheld == []


def test_bad_arguments_are_named():
    parameter = [torch.nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.SGD(parameter, lr=1.0)
    for options, shown in (
        ({"gamma": 0.0, "eta0": 1.0}, "gamma.*0.0"),
        ({"gamma": 1.0, "eta0": -1.0}, "eta0.*-1.0"),
        ({"gamma": 1.0, "eta0": 1.0, "weak_convexity": 2.0}, "gamma.*0.5.*1.0"),
    ):
        with pytest.raises(ValueError, match=shown):
            Stagewise(optimizer, **options)
    with pytest.raises(ValueError, match="momentum must be 0.*0.9"):
        Stagewise(torch.optim.SGD(parameter, lr=1.0, momentum=0.9), gamma=1.0, eta0=1.0)
    short = Stagewise(optimizer, gamma=1.0, eta0=1.0, stage_steps=lambda s: 12)
    with pytest.raises(ValueError, match=r"stage_steps\(1\).*24.*12"):
        short.steps_of(1)


def test_the_penalty_of_a_frozen_model_is_zero():
    (transport,) = in_process.group(1)
    model, _, _, stages = make(transport)
    model.requires_grad_(False)
    penalty = stages.penalty()
    assert penalty.shape == () and float(penalty) == 0.0
