"""What DDP users do around a hook holds: at density 1 every training ends where plain DDP's ends, on all ranks."""

import contextlib

import torch
from ddp_cases import Data, loss_of, make_net, make_state, wrap
from launch import spawn_gloo
from torch import nn
from torch.utils.checkpoint import checkpoint

from commhooks import register

STEPS = 3


class Tied(nn.Module):
    """One weight in two places."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 4, bias=False), nn.Linear(6, 4, bias=False)
        self.last.weight = self.first.weight

    def forward(self, x):
        return self.last(x + self.first(x) @ self.first.weight)


class Checkpointed(nn.Module):
    """Computes its inner layers again in backward."""

    def __init__(self, reentrant):
        super().__init__()
        self.net, self.reentrant = make_net(), reentrant

    def forward(self, x):
        h = torch.tanh(self.net.first(x))
        h = checkpoint(lambda h: torch.tanh(self.net.inner(h)), h, use_reentrant=self.reentrant)
        return self.net.last(torch.tanh(self.net.middle(h)))


def plain(ddp, rank, data):
    train(ddp, torch.optim.SGD(ddp.parameters(), lr=0.1), [data(step) for step in range(STEPS)])


def uneven_inputs(ddp, rank, data):
    """Rank 1 has two batches more; the others join."""
    with ddp.join():
        plain_data = [data(step) for step in range(STEPS + 2 * (rank == 1))]
        train(ddp, torch.optim.SGD(ddp.parameters(), lr=0.1), plain_data)


def no_sync(ddp, rank, data):
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        for turn in range(2):
            with contextlib.nullcontext() if turn else ddp.no_sync():
                loss_of(ddp, data(2 * step + turn)).backward()
        optimizer.step()


def two_optimizers(ddp, rank, data):
    parameters = list(ddp.parameters())
    one = torch.optim.SGD(parameters[:3], lr=0.1, momentum=0.5)
    other = torch.optim.Adam(parameters[3:], lr=0.01)
    for step in range(STEPS):
        ddp.zero_grad()
        loss_of(ddp, data(step)).backward()
        one.step()
        other.step()


def train(ddp, optimizer, batches):
    for batch in batches:
        optimizer.zero_grad()
        loss_of(ddp, batch).backward()
        optimizer.step()


CASES = {
    "join": (make_net, uneven_inputs),
    "no_sync": (make_net, no_sync),
    "tied weights": (Tied, plain),
    "two optimizers": (make_net, two_optimizers),
    "checkpointing": (lambda: Checkpointed(False), plain),
    "reentrant checkpointing": (lambda: Checkpointed(True), plain),
    "compiled inside": (lambda: torch.compile(make_net(), backend="aot_eager"), plain),
}


def _all(rank, size):
    """By case: the largest difference from plain DDP, and the weights after the training."""
    found = {}
    for name, (make, training) in CASES.items():
        ends = []
        for hooked in (True, False):
            torch.manual_seed(0)
            options = (
                {"bucket_cap_mb": 25} if "compiled" in name else {}
            )  # dynamo refuses the tests' small ones
            ddp = wrap(make(), **options)
            if hooked:
                state = register(ddp, make_state("topk", 1.0))
            start = torch.cat([p.detach().flatten().clone() for p in ddp.parameters()])
            training(ddp, rank, Data(rank))
            ends.append(torch.cat([p.detach().flatten() for p in ddp.parameters()]))
            assert not torch.equal(ends[-1], start), name
        assert state.error is None and state.stats()["bytes_sent"] > 0, name
        state.close()
        found[name] = float((ends[0] - ends[1]).abs().max()), ends[0]
    return found


def test_training_around_the_hook_is_as_with_plain_ddp():
    first, second = spawn_gloo(_all, 2, timeout=120.0)
    for name in CASES:
        assert first[name][0] < 1e-6 and second[name][0] < 1e-6, (name, first[name][0])
        assert torch.equal(first[name][1], second[name][1]), name
