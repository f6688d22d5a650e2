"""What the DDP tests share: a model with several buckets, data per rank, gradients computed beside DDP."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from commhooks import ErrorFeedback, SparseState, register
from commhooks.schemes import make_parts

SCHEMES = ("topk", "gtopk", "gtopk-tree", "randomk", "dense")
SMALL_BUCKETS_MB = 0.0002  # about 52 float32 elements: from the second step on the model below has 4 buckets


class Net(nn.Module):
    """Layers that are declared in another order than they are used, so DDP lays its buckets anew after a step."""

    def __init__(self, width=16, extra=False):
        super().__init__()
        self.last = nn.Linear(width, 4)
        self.first = nn.Linear(6, width)
        self.inner = nn.Linear(width, width)
        self.middle = nn.Linear(width, width)
        self.extra = nn.Linear(width, width) if extra else None

    def forward(self, x, use_extra=False):
        h = torch.tanh(self.middle(torch.tanh(self.inner(torch.tanh(self.first(x))))))
        if use_extra:
            h = torch.tanh(self.extra(h))
        return self.last(h)


def make_net(seed=0, dtype=torch.float32, **options):
    torch.manual_seed(seed)
    return Net(**options).to(dtype)


def wrap(model, **options):
    """DDP with small buckets."""
    return DistributedDataParallel(model, **{"bucket_cap_mb": SMALL_BUCKETS_MB, **options})


def make_state(scheme, density=0.1, memory=None, **options):
    """A state that never goes dense and gives up after 20 s, unless told otherwise."""
    options = {"dense_crossover": False, "timeout_s": 20.0, **options}
    transport = options.pop("transport", "distributed")
    return SparseState(*make_parts(scheme, density, transport, memory=memory or ErrorFeedback()), **options)


def sparse_ddp(scheme, density=0.1, memory=None, model=None, ddp_options=None, **options):
    """A registered model and its state."""
    ddp = wrap(make_net() if model is None else model, **(ddp_options or {}))
    return ddp, register(ddp, make_state(scheme, density, memory, **options))


class Data:
    """Batches that differ by rank and step, the same in every run."""

    def __init__(self, rank, dtype=torch.float32):
        self.rank, self.dtype = rank, dtype

    def __call__(self, step):
        generator = torch.Generator().manual_seed(1000 * step + self.rank)
        x = torch.randn(5, 6, generator=generator)
        y = 2.0 * torch.stack((x[:, 0], x[:, 1] * x[:, 2], x[:, 3].abs(), -x[:, 4]), 1)
        return x.to(self.dtype), y.to(self.dtype)


def loss_of(model, batch, **options):
    x, y = batch
    return (model(x, **options).float() - y.float()).square().mean()


def local_gradients(ddp, batch, scale=1.0, **options):
    """This rank's own gradient by name, from a copy of the model: what DDP would see before averaging."""
    model = copy.deepcopy(ddp.module)
    for p in model.parameters():
        p.grad = None
    (loss_of(model, batch, **options) * scale).backward()
    return {n: p.grad for n, p in model.named_parameters()}


def flat(tensors):
    return torch.cat([t.detach().float().reshape(-1) for t in tensors])


def parameters_of(ddp):
    """All parameters, flat, float32, in the order of the names."""
    return flat(p.clone() for _, p in sorted(ddp.module.named_parameters()))


def gradients_of(ddp):
    """What the hook left in .grad, in the order of the names."""
    return flat(p.grad for _, p in sorted(ddp.module.named_parameters()))


def memory_of(ddp, state, kind="residual"):
    """The residual (or velocity), flat in the order of the names; zeros before the first step."""
    saved = state.reducer.state_dict()[kind]
    return flat(saved.get(n, torch.zeros(p.numel())) for n, p in sorted(ddp.module.named_parameters()))


def by_name(gradients):
    return flat(g for _, g in sorted(gradients.items()))


def mean_over_ranks(tensor):
    """The average in float64."""
    total = tensor.double()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def same_on_all_ranks(tensor):
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor.contiguous())
    return all(torch.equal(g, tensor) for g in gathered)


def buckets_seen(state):
    """Makes the state note the parameters of every bucket it is given; returns the list of lists, by step."""
    seen, submit = [[]], state.submit

    def noting(buffer, index, parameters, is_last):
        seen[-1].append(tuple(p.numel() for p in parameters))
        if is_last:
            seen.append([])
        return submit(buffer, index, parameters, is_last)

    state.submit = noting
    return seen


def parameter_buckets(state, ddp):
    """Makes the state note the parameters' names of every bucket; the last entry is the latest step's layout."""
    names = {p: n for n, p in ddp.module.named_parameters()}
    steps, submit = [[]], state.submit

    def noting(buffer, index, parameters, is_last):
        steps[-1].append([names[p] for p in parameters])
        if is_last:
            steps.append([])
        return submit(buffer, index, parameters, is_last)

    state.submit = noting
    return steps


def corrected_now(ddp, state, gradients, beta=0.0):
    """``u_p + v_p`` of this rank as Algorithm 1 has it, and ``v_p``; parameters without gradient take no part."""
    u, v = memory_of(ddp, state), memory_of(ddp, state, "velocity") if beta else None
    named = sorted(ddp.module.named_parameters())
    g = flat(torch.zeros_like(p) if gradients[n] is None else gradients[n] for n, p in named)
    active = torch.cat(
        [
            torch.full((p.numel(),), gradients[n] is not None and bool((gradients[n] != 0).any()))
            for n, p in named
        ]
    )
    velocity = g if v is None else torch.where(active, beta * v + g, v)
    return torch.where(active, u + velocity, u), velocity


def check_step(ddp, state, batches, beta=0.0, scale=1.0, tolerance=1e-6, options=None):
    """Accumulates ``batches`` (all but the last under no_sync) and asserts that the exchange conserves mass.

    Returns:
        the update (n,) float32, in unscaled units; None where DDP left no gradient counts as 0.
    """
    options = options or {}
    total = None
    for batch in batches:
        g = local_gradients(ddp, batch, **options)
        total = g if total is None else {n: total[n] + g[n] for n in g}
    corrected, velocity = corrected_now(ddp, state, total, beta)
    ddp.zero_grad()
    for batch in batches[:-1]:
        with ddp.no_sync():
            (loss_of(ddp, batch, **options) * scale).backward()
    (loss_of(ddp, batches[-1], **options) * scale).backward()
    named = sorted(ddp.module.named_parameters())
    update = flat(torch.zeros_like(p) if p.grad is None else p.grad for _, p in named) / scale
    size = mean_over_ranks(corrected.abs()) + mean_over_ranks(velocity.abs()) + 1e-30
    error = mean_over_ranks(memory_of(ddp, state)) + update.double() - mean_over_ranks(corrected)
    worst = float((error.abs() / size.clamp(min=float(size.max()) * 1e-3)).max())
    assert worst <= tolerance, worst
    if beta:
        torch.testing.assert_close(memory_of(ddp, state, "velocity"), velocity, rtol=1e-5, atol=1e-6)
    assert same_on_all_ranks(update)
    return update


def sgd_step(ddp, update, rate=0.05):
    """Plain SGD with what DDP left in .grad."""
    with torch.no_grad():
        for p in ddp.parameters():
            if p.grad is not None:
                p -= rate * p.grad
