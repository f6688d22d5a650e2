"""Workers under test: a small model in pieces, given gradients, one thread per rank."""

from __future__ import annotations

import torch

from commhooks.averaging import BlockMomentum, DecentralizedMomentum, LocalSGD, RestartedMomentum, topology
from commhooks.transports import in_process

SHAPES = ((3, 2), (4,))
NUMEL = sum(torch.Size(s).numel() for s in SHAPES)


class Pieces(torch.nn.Module):
    """Parameters of several shapes with flat values; with ``buffers`` a float and an integer one too."""

    def __init__(self, flat, dtype=torch.float64, buffers=False):
        super().__init__()
        parts = flat.to(dtype).split([torch.Size(s).numel() for s in SHAPES])
        self.parts = torch.nn.ParameterList(
            [part.clone().reshape(s) for part, s in zip(parts, SHAPES, strict=True)]
        )
        if buffers:
            self.register_buffer("running", torch.zeros(3, dtype=dtype))
            self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def flat(self):
        return torch.cat([p.detach().reshape(-1) for p in self.parts]).double()

    def set_gradient(self, flat):
        offset = 0
        for p in self.parts:
            p.grad = flat[offset : offset + p.numel()].reshape(p.shape).to(p.dtype)
            offset += p.numel()


def flat_momentum(optimizer):
    """All momentum buffers of an SGD optimizer as one flat tensor."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return torch.cat([optimizer.state[p]["momentum_buffer"].reshape(-1) for p in parameters]).double()


def start(seed=1):
    """A starting point ``(NUMEL,)`` float64."""
    return torch.randn(NUMEL, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run_steps(model, optimizer, averager, gradient, rank, steps, first=0):
    """The plain loop; returns the iterates ``(steps + 1, n)`` with the start."""
    history = [model.flat()]
    for t in range(first, first + steps):
        model.set_gradient(gradient(rank, t, model.flat()))
        optimizer.step()
        averager.average_parameters(model.parameters())
        history.append(model.flat())
    return torch.stack(history)


def in_ranks(world_size, work, timeout_s=20.0):
    """``work(transport)`` on all ranks; results stacked or listed by rank."""
    results = in_process.run(world_size, work, timeout_s)
    return torch.stack(results, dim=1) if isinstance(results[0], torch.Tensor) else results


def averagers(model, optimizer, transport, period=2, **options):
    """One of each kind, made one after the other on the same model."""
    parameters = list(model.parameters())
    network = topology.complete(transport.world_size)
    yield LocalSGD(period, transport=transport, **options)
    yield BlockMomentum(0.5, period, params=parameters, transport=transport, **options)
    yield RestartedMomentum(optimizer, period, transport=transport, **options)
    if options.get("buffers") != "broadcast":
        yield DecentralizedMomentum(optimizer, network, period=period, transport=transport, **options)


def pair_averager(kind, parameter, **options):
    """An averager of two ranks that synchronises after every step: ``"local"`` or ``"decentralized"``."""
    if kind == "local":
        return LocalSGD(1, **options)
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    return DecentralizedMomentum(optimizer, topology.complete(2), **options)
