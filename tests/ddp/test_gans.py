"""GANs whose two networks are a DDP model each: the generator's loss runs backward through the discriminator's.

The loop is that of PyTorch's DCGAN example: two passes for the discriminator's step, and then a pass for the
generator's whose gradients of the discriminator are discarded by the next ``zero_grad``.
"""

import warnings
from contextlib import contextmanager, nullcontext

import pytest
import torch
from launch import spawn_gloo
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from commhooks import ErrorFeedback, SparseState, register
from commhooks.ddp import step_watch

RATES = {"D": 0.05, "G": 0.02}
STEPS = 6


def networks():
    torch.manual_seed(0)
    discriminator = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    return {"D": discriminator, "G": nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 6))}


def of_real(nets, real, z):
    return F.softplus(-nets["D"](real)).mean()


def of_fake(nets, real, z):
    return F.softplus(nets["D"](nets["G"](z).detach())).mean()


def of_generator(nets, real, z):
    return F.softplus(-nets["D"](nets["G"](z))).mean()


@contextmanager
def frozen(module):
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


class Due:
    """What this rank's gradients that count add up to, through the velocity of each network's memory."""

    def __init__(self, momentum):
        self.momentum, self.twins, self.sums, self.velocities = momentum, networks(), {}, {}

    def add(self, which, nets, losses, real, z):
        for name, net in nets.items():
            self.twins[name].load_state_dict(net.module.state_dict())
            self.twins[name].zero_grad()
        sum(loss(self.twins, real, z) for loss in losses).backward()
        for name, p in self.twins[which].named_parameters():
            key = f"{which}.{name}"
            velocity = self.momentum * self.velocities.get(key, 0.0) + p.grad.flatten()
            self.velocities[key] = velocity
            self.sums[key] = self.sums.get(key, 0.0) + velocity


def _train(rank, remedy, scheme, momentum):
    """Returns by parameter what was applied, withheld and due, and the texts of the warnings."""
    nets, states, optimizers = {}, {}, {}
    for name, net in networks().items():
        nets[name] = DistributedDataParallel(net)
        options = {
            "dense_crossover": False,
            "timeout_s": 20.0,
            "undoable": name == "D" and remedy == "discard",
        }
        memory = ErrorFeedback(momentum=momentum)
        state = getattr(SparseState, scheme)(0.2, memory=memory, **options)
        states[name] = register(nets[name], state)
        optimizers[name] = torch.optim.SGD(nets[name].parameters(), lr=RATES[name])
    start = {f"{which}.{name}": p for which, net in networks().items() for name, p in net.named_parameters()}
    due, random = Due(momentum), torch.Generator().manual_seed(rank)
    through = {"passthrough": states["D"].passthrough, "freeze": lambda: frozen(nets["D"])}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(STEPS):
            real, z = torch.randn(8, 6, generator=random) + 1.0, torch.randn(8, 3, generator=random)
            due.add("D", nets, (of_real, of_fake), real, z)
            nets["D"].zero_grad()
            for loss in (of_real, of_fake):
                loss(nets, real, z).backward()
            optimizers["D"].step()
            due.add("G", nets, (of_generator,), real, z)
            nets["G"].zero_grad()
            with through.get(remedy, nullcontext)():
                of_generator(nets, real, z).backward()
            if remedy == "discard":
                states["D"].discard()
            optimizers["G"].step()
    found = {}
    for which, net in nets.items():
        residual = states[which].reducer.state_dict()["residual"]
        for name, p in net.module.named_parameters():
            key = f"{which}.{name}"
            applied = (start[key] - p).detach().flatten() / RATES[which]
            found[key] = applied, residual[name], due.sums[key]
        states[which].close()
    return found, [str(w.message) for w in caught]


REMEDIES = [
    (r, s, m) for r in ("discard", "passthrough", "freeze") for s, m in (("topk", 0.9), ("gtopk", 0.0))
]


def _every_case(rank, size):
    return [_train(rank, *case) for case in (("nothing", "topk", 0.0), *REMEDIES)]


@pytest.fixture(scope="module", params=[2, 3])
def trained(request):
    """By case, what each rank returned."""
    ranks = spawn_gloo(_every_case, request.param, timeout=300.0)
    return dict(zip((("nothing", "topk", 0.0), *REMEDIES), zip(*ranks, strict=True), strict=True))


def lost(ranks):
    """The largest part of a parameter's due gradients that is neither in the model nor in a residual."""
    founds, parts = [found for found, _ in ranks], []
    for key, (applied, _, _) in founds[0].items():
        assert all(torch.equal(applied, found[key][0]) for found in founds), key
        withheld = sum(found[key][1] for found in founds) / len(founds)
        due = sum(found[key][2] for found in founds) / len(founds)
        parts.append(float((applied + withheld - due).norm() / due.norm()))
    return max(parts)


@pytest.mark.parametrize("case", REMEDIES)
def test_the_generators_pass_leaves_no_trace_in_the_discriminators_memory(trained, case):
    assert lost(trained[case]) < 1e-4
    for _, texts in trained[case]:
        assert texts == []


def test_a_generators_pass_that_is_discarded_without_a_word_is_warned_of_once(trained):
    ranks = trained["nothing", "topk", 0.0]
    assert lost(ranks) > 0.01  # there is something to warn of
    for _, texts in ranks:
        assert texts == [step_watch.DISCARDED]
    for remedy in ("state.discard()", "undoable=True", "state.passthrough()"):
        assert remedy in step_watch.DISCARDED
