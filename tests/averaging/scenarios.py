"""What every transport must do alike: the algorithms' trajectories, and the bytes they cost."""

from __future__ import annotations

import torch
from low_bit_oracle import LowBitRanks

from commhooks import AllGather, ErrorFeedback, LowBit, Reducer, TopK
from commhooks.averaging import (
    BlockMomentum,
    DecentralizedMomentum,
    DiLoCo,
    LocalSGD,
    RestartedMomentum,
    topology,
)
from commhooks.exchange.agreement import MESSAGE_BYTES

from . import oracles
from .workers import NUMEL, Pieces, flat_momentum, run_steps, start

STEPS, RATE, BETA = 6, 0.1, 0.9
SETTINGS_BYTES = 48  # a checksum of the settings, compared before each synchronisation, and votes


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def check_all(transport):
    """All scenarios on one transport; asserts on every rank."""
    check_local(transport)
    check_block(transport)
    check_restarted(transport)
    check_decentralized(transport)
    check_buffers_and_broadcast(transport)
    check_compressed(transport)
    check_wire(transport)


def check_local(transport):
    world_size, rank = transport.world_size, transport.rank
    gradient = oracles.make_gradient(world_size, STEPS, NUMEL)
    for weights in ([1.0] * world_size, [1.0 + p for p in range(world_size)]):
        model = Pieces(start())
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        before = transport.counters.bytes_sent
        averager = LocalSGD(3, transport=transport, weight=weights[rank])
        history = run_steps(model, optimizer, averager, gradient, rank, STEPS)
        same(
            history,
            oracles.local_sgd(start(), gradient, world_size, STEPS, lambda t: RATE, {3, 6}, weights)[:, rank],
        )
        ring = 2 * (world_size - 1) * 8 * NUMEL // world_size
        expected = 2 * (ring + (world_size - 1) * SETTINGS_BYTES)
        assert transport.counters.bytes_sent - before == expected


def check_block(transport):
    gradient = oracles.make_gradient(transport.world_size, STEPS, NUMEL)
    model = Pieces(start() * (1 + transport.rank))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    averager = BlockMomentum(0.7, 2, params=model.parameters(), transport=transport)
    averager.broadcast_parameters(model.parameters())
    history = run_steps(model, optimizer, averager, gradient, transport.rank, STEPS)
    expected, _, _, _ = oracles.m_avg(start(), gradient, transport.world_size, 3, 2, RATE, 0.7)
    same(history, expected[:, transport.rank])


def check_restarted(transport):
    gradient = oracles.make_gradient(transport.world_size, STEPS, NUMEL)
    for option in ("I", "II"):
        model = Pieces(start())
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=BETA, nesterov=option == "II")
        averager = RestartedMomentum(optimizer, 3, transport=transport)
        history = run_steps(model, optimizer, averager, gradient, transport.rank, STEPS)
        xs, us = oracles.pr_sgd_m(start(), gradient, transport.world_size, STEPS, RATE, BETA, 3, option)
        same(history, xs[:, transport.rank])
        same(flat_momentum(optimizer), us[-1, transport.rank])


def check_decentralized(transport):
    """Trajectories, and that nothing but messages to neighbours was sent: every byte is accounted for."""
    world_size, rank = transport.world_size, transport.rank
    gradient = oracles.make_gradient(world_size, STEPS, NUMEL)
    for network in (
        topology.ring(world_size),
        topology.complete(world_size),
        topology.one_peer_exponential(world_size),
    ):
        model = Pieces(start())
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=BETA)
        averager = DecentralizedMomentum(optimizer, network, transport=transport)
        bytes_before, messages_before = transport.counters.bytes_sent, transport.counters.messages
        history = run_steps(model, optimizer, averager, gradient, rank, STEPS)
        degrees = [network.degree(rank, t) for t in range(STEPS)]
        assert transport.counters.messages - messages_before == 2 * sum(degrees)
        data = MESSAGE_BYTES + 40 + 2 * 8 * NUMEL  # settings, votes; parameters and momentum, float64
        assert transport.counters.bytes_sent - bytes_before == sum(degrees) * data
        xs, us = oracles.decentralized(
            start(), gradient, world_size, STEPS, RATE, BETA, network.matrices, "I"
        )
        same(history, xs[:, rank])
        same(flat_momentum(optimizer), us[-1, rank])
        averager.average_now(model.parameters())
        same(model.flat(), xs[-1].mean(dim=0))


def check_buffers_and_broadcast(transport):
    model = Pieces(start() + transport.rank, buffers=True)
    model.running.fill_(transport.rank)
    averager = LocalSGD(1, transport=transport, module=model)
    averager.average_parameters(model.parameters())
    mean = (transport.world_size - 1) / 2
    same(model.running, torch.full((3,), mean, dtype=torch.float64))
    same(model.flat(), start() + mean)
    model = Pieces(start() + transport.rank)
    averager.broadcast_parameters(model.parameters())
    assert torch.equal(model.flat(), start())


def check_compressed(transport):
    gradient = oracles.make_gradient(transport.world_size, STEPS, NUMEL)
    model = Pieces(start(), dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    reducer = Reducer(TopK(0.3), AllGather(transport=transport), ErrorFeedback(), dense_crossover=False)
    averager = BlockMomentum(0.5, 2, params=model.parameters(), transport=transport, reducer=reducer)
    run_steps(model, optimizer, averager, gradient, transport.rank, STEPS)
    everyone = torch.empty(transport.world_size, NUMEL, dtype=torch.float64)
    transport.all_gather(model.flat(), everyone, tag=1, what="models")
    assert (everyone == everyone[0]).all() and not torch.equal(everyone[0], start())


WIRE_NUMEL, WIRE_STEPS = 700, 5


def moved(rank, step):
    """What rank's local step adds to its model: float32 ``(WIRE_NUMEL,)``."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(WIRE_NUMEL, generator=generator) * 0.1


def wired(world_size, bits, period, outer, steps=WIRE_STEPS):
    """Averaging on a low-bit wire as its pseudocode: the models ``[step][rank]``, and A after each step.

    Args:
        outer: makes an outer optimizer of a list of tensors.
    """
    anchor = torch.nn.Parameter(torch.zeros(WIRE_NUMEL))
    optimizer, ranks = outer([anchor]), LowBitRanks(world_size, WIRE_NUMEL, bits)
    w = [torch.zeros(WIRE_NUMEL) for _ in range(world_size)]
    history = []
    for step in range(1, steps + 1):
        w = [w_p + moved(p, step) for p, w_p in enumerate(w)]
        if step % period == 0:
            mean, withheld = ranks.exchange([w_p - anchor.detach() for w_p in w])
            anchor.grad = -mean
            optimizer.step()
            w = [e_p + anchor.detach() for e_p in withheld]
        history.append(([w_p.clone() for w_p in w], anchor.detach().clone()))
    return history


def pair_of_parameters():
    return [torch.nn.Parameter(torch.zeros(20, 30)), torch.nn.Parameter(torch.zeros(100))]


def local_step(params, change):
    with torch.no_grad():
        for p, piece in zip(params, change.split([p.numel() for p in params]), strict=True):
            p.add_(piece.view(p.shape))


def flat_of(params):
    return torch.cat([p.detach().reshape(-1) for p in params])


def check_wire(transport):
    """DiLoCo on wires of all bits has the bits of the simulation: A and every rank's own model."""
    for bits in (1, 2, 4, 8, 16, 32):
        options = {"lr": 1.0} if bits == 8 else {"lr": 0.75, "momentum": 0.5, "nesterov": True}
        outer = lambda params, o=options: torch.optim.SGD(params, **o)  # noqa: E731
        expected = wired(transport.world_size, bits, 2, outer)
        params = pair_of_parameters()
        wire = torch.bfloat16 if bits == 16 else LowBit(bits)
        averager = DiLoCo(params, outer, sync_every=2, wire=wire, transport=transport)
        for step in range(1, WIRE_STEPS + 1):
            local_step(params, moved(transport.rank, step))
            averager.average_parameters(params)
            models, anchor = expected[step - 1]
            assert torch.equal(flat_of(params), models[transport.rank]), (bits, step)
            assert torch.equal(averager.anchor, anchor), (bits, step)
