"""Optimizers with other state than momentum: Adam's moments averaged, mixed, or left alone."""

import pytest
import torch

from commhooks import AllGather, ErrorFeedback, Reducer, TopK
from commhooks.averaging import DecentralizedMomentum, RestartedMomentum, topology
from commhooks.transports import in_process

from . import oracles
from .workers import NUMEL, Pieces, in_ranks, run_steps, start

SIZES = (1, 2, 3, 4, 5)
STEPS = 8
MAKERS = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.05, weight_decay=0.1),
    "amsgrad": lambda params: torch.optim.Adam(params, lr=0.05, amsgrad=True),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1),
    "nadam": lambda params: torch.optim.NAdam(params, lr=0.05),
}


def simulate(kind, gradient, world_size, sync, mix, moments):
    """P optimizers on flat parameters in one process; ``mix(list) -> list`` on parameters, and on state if
    asked.

    Returns the iterates ``(steps + 1, P, n)``.
    """
    params = [torch.nn.Parameter(start()) for _ in range(world_size)]
    optimizers = [MAKERS[kind]([p]) for p in params]
    history = [torch.stack([p.detach().clone() for p in params])]
    for t in range(STEPS):
        for p in range(world_size):
            params[p].grad = gradient(p, t, params[p].detach())
            optimizers[p].step()
        if t + 1 in sync:
            groups = [[p.data for p in params]]
            if moments:
                states = [o.state[p] for o, p in zip(optimizers, params, strict=True)]
                groups += [[s[key] for s in states] for key in states[0] if torch.is_tensor(states[0][key])]
            for group in groups:
                for tensor, new in zip(group, mix([x.double().clone() for x in group]), strict=True):
                    tensor.copy_(new)
        history.append(torch.stack([p.detach().clone() for p in params]))
    return torch.stack(history)


def mean(tensors):
    return [sum(tensors) / len(tensors)] * len(tensors)


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("world_size", SIZES)
@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("moments", ("average", "leave"))
def test_restarted_with_any_optimizer(world_size, kind, moments):
    gradient = oracles.make_gradient(world_size, STEPS, NUMEL)

    def work(transport):
        model = Pieces(start())
        optimizer = MAKERS[kind](model.parameters())
        averager = RestartedMomentum(optimizer, 3, moments=moments, transport=transport)
        return run_steps(model, optimizer, averager, gradient, transport.rank, STEPS)

    expected = simulate(kind, gradient, world_size, {3, 6}, mean, moments == "average")
    same(in_ranks(world_size, work), expected)


@pytest.mark.parametrize("world_size", SIZES)
@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("moments", ("mix", "leave"))
def test_decentralized_with_any_optimizer(world_size, kind, moments):
    gradient = oracles.make_gradient(world_size, STEPS, NUMEL)
    network = topology.ring(world_size)
    w = network.matrices[0]

    def work(transport):
        model = Pieces(start())
        optimizer = MAKERS[kind](model.parameters())
        averager = DecentralizedMomentum(optimizer, network, moments=moments, transport=transport)
        return run_steps(model, optimizer, averager, gradient, transport.rank, STEPS)

    def mix(x):
        return [sum(w[j, i] * x[j] for j in range(world_size)) for i in range(world_size)]

    expected = simulate(kind, gradient, world_size, set(range(1, 9)), mix, moments == "mix")
    same(in_ranks(world_size, work), expected)


@pytest.mark.parametrize("kind", ("adamw", "adagrad"))
@pytest.mark.parametrize("averager_of", (RestartedMomentum, DecentralizedMomentum))
def test_a_parameter_without_state_on_a_rank_gets_one(kind, averager_of):
    """Rank 1 has not stepped at all (a scaler skipped it), rank 0 has: moments and step count are halved."""

    def work(transport):
        model = Pieces(start())
        optimizer = MAKERS[kind](model.parameters())
        args = (1,) if averager_of is RestartedMomentum else (topology.complete(2),)
        averager = averager_of(optimizer, *args, moments="average", transport=transport)
        if transport.rank == 0:
            model.set_gradient(torch.ones(NUMEL, dtype=torch.float64))
            optimizer.step()
        own = (
            {k: v.clone() for k, v in optimizer.state[model.parts[1]].items()}
            if transport.rank == 0
            else None
        )
        averager.average_parameters(model.parameters())
        state = {k: v.clone() for k, v in optimizer.state[model.parts[1]].items()}
        model.set_gradient(torch.ones(NUMEL, dtype=torch.float64))
        optimizer.step()
        return own, state, model.flat()

    (own, first, a), (_, second, b) = in_process.run(2, work)
    for key, value in own.items():
        torch.testing.assert_close(first[key], value / 2)
        torch.testing.assert_close(second[key], value / 2)
    assert torch.equal(a, b) and a.isfinite().all()


def test_step_counts_that_are_equal_stay_exact():
    def work(transport):
        parameter = torch.nn.Parameter(torch.zeros(3))
        optimizer = torch.optim.AdamW([parameter])
        averager = RestartedMomentum(optimizer, 1, moments="average", transport=transport)
        parameter.grad = torch.ones(3)
        optimizer.step()
        optimizer.state[parameter]["step"].fill_(12345679.0)  # times 3 it is no float32
        averager.average_parameters([parameter])
        return optimizer.state[parameter]["step"].item()

    assert in_process.run(3, work) == [12345679.0] * 3


def test_moments_are_sent_and_left_ones_are_not():
    def sent(moments):
        def work(transport):
            model = Pieces(start(), dtype=torch.float32)
            optimizer = torch.optim.AdamW(model.parameters())
            averager = RestartedMomentum(optimizer, 1, moments=moments, transport=transport)
            run_steps(model, optimizer, averager, lambda p, t, x: x, transport.rank, 1)
            return averager.stats()["bytes_sent"]

        return in_process.run(2, work)[0]

    assert sent("leave") == 48 + 4 * NUMEL
    assert sent("average") == 48 + 4 * 3 * NUMEL + 8 * 2  # two step counts, float64


def test_a_reducer_compresses_parameters_and_leaves_second_moments_whole():
    """Averages of a compressed change could make a second moment negative, and its root NaN."""
    gradient = oracles.make_gradient(4, 30, NUMEL)

    def work(transport):
        model = Pieces(start(), dtype=torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        reducer = Reducer(TopK(0.2), AllGather(transport=transport), ErrorFeedback(), dense_crossover=False)
        averager = RestartedMomentum(optimizer, 2, moments="average", transport=transport, reducer=reducer)
        run_steps(model, optimizer, averager, gradient, transport.rank, 30)
        assert set(reducer.state_dict()["residual"]) == {"parameter 0", "parameter 1"}
        moments = torch.cat([optimizer.state[p]["exp_avg_sq"].flatten() for p in model.parts])
        assert (moments >= 0).all()
        return torch.stack([model.flat(), moments.double()])

    result = in_ranks(4, work)
    for rank in range(1, 4):
        assert torch.equal(result[:, rank], result[:, 0])
    assert result.isfinite().all()


def test_the_choice_is_named():
    adam = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
    transport = in_process.group(1)[0]
    with pytest.raises(ValueError, match="got Adam: say moments='average'.*moments='leave'"):
        RestartedMomentum(adam, 1, transport=transport)
    with pytest.raises(ValueError, match="moments must be.*'keep'"):
        RestartedMomentum(adam, 1, moments="keep", transport=transport)
    assert "optimizer=Adam, moments=averaged" in repr(
        RestartedMomentum(adam, 1, moments="average", transport=transport)
    )
    assert "optimizer=Adam, moments=left alone" in repr(
        RestartedMomentum(adam, 1, moments="leave", transport=transport)
    )
    dampened = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9, dampening=0.1)
    RestartedMomentum(dampened, 1, moments="leave", transport=transport)


def test_an_optimizer_that_cannot_be_copied_says_so():
    class Odd(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 1.0})
            self.needed = 1.0

        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["average"] = p.grad * self.needed

    parameter = torch.nn.Parameter(torch.zeros(1))
    averager = RestartedMomentum(Odd([parameter]), 1, moments="average", transport=in_process.group(1)[0])
    with pytest.raises(ValueError, match="Odd cannot make one: say moments='leave'"):
        averager.average_parameters([parameter])
