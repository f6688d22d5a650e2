"""Small models for tests of what a step is, and how their cases are run."""

import warnings

import torch
from launch import spawn_gloo
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from commhooks import ErrorFeedback, SparseState, register, sparse_hook


class W(nn.Module):
    """The gradient of ``w``, of ``n`` elements, is the module's input."""

    def __init__(self, n=4):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(n))

    def forward(self, g):
        return (self.w * g).sum()


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))

    def forward(self, g, which):
        return (getattr(self, which) * g).sum()


def made(model=None, momentum=0.0, raw=False, state_options=None, **ddp_options):
    ddp = DistributedDataParallel(W() if model is None else model, **ddp_options)
    options = {"dense_crossover": False, "timeout_s": 20.0, **(state_options or {})}
    state = SparseState.topk(0.25, memory=ErrorFeedback(momentum=momentum), **options)
    if raw:
        state.set_names(ddp.module.named_parameters())
        ddp.register_comm_hook(state, sparse_hook)
        return ddp, state
    return ddp, register(ddp, state)


def law(ddp, state):
    return (ddp.module.w.grad + state.reducer.state_dict()["residual"]["w"]).tolist()


def told(work):
    """How often ``work`` warned of discarded gradients."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        work()
    return sum("zeroed before an optimizer" in str(w.message) for w in caught)


PAIRS = [(a, b) for a in (True, False) for b in (False, True)]
MODES = [(to_none, view, raw) for to_none in (True, False) for view in (False, True) for raw in (False, True)]


def in_turn(rank, size, work, cases):
    """What ``work`` returns for each case: process starts dominate."""
    return [work(rank, size, *case) for case in cases]


def each(work, cases):
    """``(case, what the two ranks returned)`` for every case."""
    return list(zip(cases, zip(*spawn_gloo(in_turn, 2, (work, cases)), strict=True), strict=True))
