"""Each algorithm against the plain simulation of its pseudocode, step for step, at several world sizes."""

import copy
import itertools

import pytest
import torch

from commhooks.averaging import (
    AtSteps,
    BlockMomentum,
    DecentralizedMomentum,
    Every,
    Growing,
    LocalSGD,
    OneShot,
    PostLocal,
    RestartedMomentum,
    topology,
)
from commhooks.transports import in_process

from . import oracles
from .workers import NUMEL, Pieces, flat_momentum, in_ranks, run_steps, start

SIZES = (1, 2, 3, 4, 8)
STEPS, RATE, BETA = 12, 0.1, 0.9


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("world_size", SIZES)
def test_local_sgd(world_size):
    gradient = oracles.make_gradient(world_size, STEPS, NUMEL)
    sets = {
        4: {4, 8, 12},
        1: set(range(1, 13)),
        OneShot(12): {12},
        AtSteps((1, 2, 5, 12)): {1, 2, 5, 12},
        Growing(first=1, maximum=4, total_steps=12): {1, 3, 7, 11, 12},
        PostLocal(5, Every(3)): {1, 2, 3, 4, 5, 8, 11},
        Every(5, start=2, total_steps=12): {7, 12},
    }
    for sync, steps in sets.items():

        def work(transport, sync=sync):
            model = Pieces(start())
            optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
            averager = LocalSGD(sync, transport=transport)
            return run_steps(model, optimizer, averager, gradient, transport.rank, STEPS)

        same(
            in_ranks(world_size, work),
            oracles.local_sgd(start(), gradient, world_size, STEPS, lambda t: RATE, steps),
        )


@pytest.mark.parametrize("world_size", (1, 3, 4))
def test_local_sgd_with_weights(world_size):
    gradient = oracles.make_gradient(world_size, STEPS, NUMEL)
    weights = [1.0 + 2.5 * p for p in range(world_size)]

    def work(transport):
        model = Pieces(start())
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        averager = LocalSGD(3, transport=transport, weight=weights[transport.rank])
        return run_steps(model, optimizer, averager, gradient, transport.rank, STEPS)

    expected = oracles.local_sgd(start(), gradient, world_size, STEPS, lambda t: RATE, {3, 6, 9, 12}, weights)
    same(in_ranks(world_size, work), expected)


@pytest.mark.parametrize("world_size", SIZES)
@pytest.mark.parametrize("mu", (0.0, 0.7))
def test_block_momentum_and_its_identity(world_size, mu):
    period, blocks = 3, 4
    gradient = oracles.make_gradient(world_size, STEPS, NUMEL)
    expected, w_tildes, vs, ds = oracles.m_avg(start(), gradient, world_size, blocks, period, RATE, mu)

    def work(transport):
        model = Pieces(start() + transport.rank)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        averager = BlockMomentum(mu, period, params=model.parameters(), transport=transport)
        averager.broadcast_parameters(model.parameters())
        history, z = [model.flat()], []
        for t in range(STEPS):
            z.append(averager.anchor + mu / (1 - mu) * averager.velocity)
            history += run_steps(model, optimizer, averager, gradient, transport.rank, 1, first=t)[1:]
        z.append(averager.anchor + mu / (1 - mu) * averager.velocity)
        same(averager.anchor, w_tildes[-1])
        same(averager.velocity, vs[-1])
        for n in range(blocks):  # eq. 4: z moves by d / (1 - mu) per block and not at all inside one
            same(z[(n + 1) * period] - z[n * period], ds[n] / (1 - mu))
            same(z[n * period + 1], z[n * period])
        return torch.stack(history)

    same(in_ranks(world_size, work), expected)


@pytest.mark.parametrize("world_size", SIZES)
@pytest.mark.parametrize("option", ("I", "II"))
def test_restarted_momentum_and_what_nesterov_maps_to(world_size, option):
    gradient = oracles.make_gradient(world_size, STEPS, NUMEL)
    for period in (1, 4):

        def work(transport, period=period):
            model = Pieces(start())
            optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=BETA, nesterov=option == "II")
            averager = RestartedMomentum(optimizer, period, transport=transport)
            assert averager.options == [option]
            history = run_steps(model, optimizer, averager, gradient, transport.rank, STEPS)
            return torch.cat([history, flat_momentum(optimizer)[None]])

        xs, us = oracles.pr_sgd_m(start(), gradient, world_size, STEPS, RATE, BETA, period, option)
        result = in_ranks(world_size, work)
        same(result[:-1], xs)
        same(result[-1], us[-1])


def networks(world_size):
    """Every kind that exists at this size."""
    kinds = [
        topology.ring,
        topology.torus,
        topology.exponential,
        topology.complete,
        topology.one_peer_exponential,
    ]
    if world_size & (world_size - 1) == 0:
        kinds.append(topology.hypercube)
    chain = topology.from_edges(world_size, itertools.pairwise(range(world_size)), "chain")
    return [*(kind(world_size) for kind in kinds), chain]


@pytest.mark.parametrize("world_size", SIZES)
def test_decentralized_momentum(world_size):
    gradient = oracles.make_gradient(world_size, STEPS, NUMEL)
    for network, option in zip(networks(world_size), itertools.cycle(("I", "II")), strict=False):

        def work(transport, network=network, option=option):
            model = Pieces(start() * (1 + transport.rank))  # any start will do
            optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=BETA, nesterov=option == "II")
            averager = DecentralizedMomentum(optimizer, network, transport=transport)
            history = run_steps(model, optimizer, averager, gradient, transport.rank, STEPS)
            return torch.cat([history, flat_momentum(optimizer)[None]])

        starts = torch.stack([start() * (1 + p) for p in range(world_size)])
        matrices = network.matrices
        xs, us = oracles.decentralized(starts, gradient, world_size, STEPS, RATE, BETA, matrices, option)
        result = in_ranks(world_size, work)
        same(result[:-1], xs)
        same(result[-1], us[-1])


@pytest.mark.parametrize("world_size", SIZES)
def test_identities(world_size):
    """I = 1 and the complete graph are mini-batch momentum SGD; local SGD and K-AVG with K = 1 plain SGD."""
    gradient = oracles.make_gradient(world_size, STEPS, NUMEL)

    def work(transport):
        rows = []
        for kind in ("restarted", "complete", "local", "k-avg"):
            model = Pieces(start())
            momentum = BETA if kind in ("restarted", "complete") else 0.0
            optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=momentum)
            if kind == "restarted":
                averager = RestartedMomentum(optimizer, 1, transport=transport)
            elif kind == "complete":
                averager = DecentralizedMomentum(
                    optimizer, topology.complete(world_size), transport=transport
                )
            elif kind == "local":
                averager = LocalSGD(1, transport=transport)
            else:
                averager = BlockMomentum(0.0, 1, params=model.parameters(), transport=transport)
            rows.append(run_steps(model, optimizer, averager, gradient, transport.rank, STEPS))
        return torch.stack(rows)

    result = in_ranks(world_size, work)  # (kind, rank, step, n)
    with_momentum = oracles.minibatch_momentum(start(), gradient, world_size, STEPS, RATE, BETA)
    plain = oracles.minibatch_momentum(start(), gradient, world_size, STEPS, RATE, 0.0)
    for rank in range(world_size):
        for kind, expected in enumerate((with_momentum, with_momentum, plain, plain)):
            same(result[kind, rank], expected)


def test_averaging_only_the_parameters_is_another_algorithm():
    """The momentum buffers are what tells PR-SGD-Momentum from local SGD with a momentum optimizer."""
    gradient = oracles.make_gradient(4, STEPS, NUMEL)

    def work(transport):
        model = Pieces(start())
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=BETA)
        return run_steps(model, optimizer, LocalSGD(4, transport=transport), gradient, transport.rank, STEPS)

    xs, _ = oracles.pr_sgd_m(start(), gradient, 4, STEPS, RATE, BETA, 4, "I")
    assert (in_ranks(4, work)[-1] - xs[-1]).abs().max() > 1e-3


def test_adam_and_momentum_inside_a_block():
    """The local optimizer is free; its state is kept at a restart unless asked otherwise."""
    gradient = oracles.make_gradient(2, 6, NUMEL)

    def work(transport, reset, kind):
        model = Pieces(start())
        parameters = list(model.parameters())
        optimizer = (
            torch.optim.Adam(parameters, lr=RATE)
            if kind == "adam"
            else torch.optim.SGD(parameters, lr=RATE, momentum=BETA)
        )
        averager = BlockMomentum(
            0.5, 3, params=parameters, transport=transport, reset_optimizer=optimizer if reset else None
        )
        run_steps(model, optimizer, averager, gradient, transport.rank, 6)
        assert (not optimizer.state) == reset
        return model.flat()

    for kind in ("adam", "momentum"):
        kept = in_ranks(2, lambda t, kind=kind: work(t, False, kind))
        reset = in_ranks(2, lambda t, kind=kind: work(t, True, kind))
        assert torch.equal(kept[:, 0], kept[:, 1])
        assert not torch.allclose(kept, reset)
    # momentum inside the blocks, against the oracle's loop written out
    w, u = [start(), start()], [torch.zeros(NUMEL, dtype=torch.float64)] * 2
    w_tilde, v = start(), torch.zeros(NUMEL, dtype=torch.float64)
    for t in range(6):
        for p in range(2):
            u[p] = BETA * u[p] + gradient(p, t, w[p])
            w[p] = w[p] - RATE * u[p]
        if t in (2, 5):
            v = 0.5 * v + (sum(w) / 2 - w_tilde)
            w_tilde = w_tilde + v
            w = [w_tilde, w_tilde]
    same(in_ranks(2, lambda t: work(t, False, "momentum"))[:, 0], w_tilde)


def test_a_copy_of_a_hooked_averager_is_called_by_hand():
    """The optimizer's step calls the original; the copy refused to be called at all."""
    (transport,) = in_process.group(1)
    parameter = torch.nn.Parameter(torch.ones(2))
    averager = LocalSGD(2, transport=transport)
    averager.hook(torch.optim.SGD([parameter], lr=0.1))
    other = copy.deepcopy(averager)
    other.average_parameters([parameter])
    assert (averager.step, other.step) == (0, 1)
    with pytest.raises(RuntimeError, match="LocalSGD is hooked"):
        averager.average_parameters([parameter])
