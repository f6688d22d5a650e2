"""What the Horovod cases share: models, data, plain oracles, and the loop that runs cases on every rank."""

import faulthandler
import json
import sys
import time
import traceback
import warnings
from pathlib import Path

import horovod.torch as hvd
import torch
from torch import nn
from torch.nn import functional

from commhooks.horovod.parameters import mask_key_of
from commhooks.native import ops

STEPS = 5
CASES = {}


def case(at_least=2, only=None):
    """Registers a case; `only` is "mpi" or "gloo"."""

    def register(function):
        CASES[f"{function.__module__}.{function.__name__}"] = (function, at_least, only)
        return function

    return register


def run_cases(folder):
    """Runs all cases in order and writes this rank's outcome: name -> "ok", a reason to skip, or a traceback."""
    outcome = {}
    for name, (function, at_least, only) in CASES.items():
        launcher = "mpi" if hvd.mpi_enabled() else "gloo"
        if hvd.size() < at_least or only not in (None, launcher):
            outcome[name] = "skipped"
            continue
        started = time.monotonic()
        faulthandler.dump_traceback_later(
            150.0, exit=True
        )  # no case takes long on an idle machine: say where it hangs, and end the job
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                function()
            outcome[name] = "ok"
        except BaseException:
            outcome[name] = traceback.format_exc()
        hvd.barrier()
        faulthandler.cancel_dump_traceback_later()
        Path(folder, f"rank{hvd.rank()}.json").write_text(json.dumps(outcome))
        elapsed_s = time.monotonic() - started
        print(
            f"rank {hvd.rank()}: {name} {elapsed_s:.1f} s: {outcome[name].splitlines()[-1]}",
            file=sys.stderr,
            flush=True,
        )


class Net(nn.Module):
    """Two branches; which comes first in backward, and which is used, can differ from rank to rank."""

    def __init__(self, seed=0, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(seed)
        self.a = nn.Linear(12, 16)
        self.b = nn.Linear(12, 16)
        self.idle = nn.Linear(3, 3)
        self.out = nn.Linear(16, 4)
        self.to(dtype)

    def forward(self, x, rank, drop=False):
        if drop and rank % 2:
            hidden = self.a(x)
        else:
            hidden = self.a(x) + self.b(x) if rank % 2 else self.b(x) + self.a(x)
        return self.out(hidden.tanh())


def batch(rank, step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randn(8, 12, generator=generator).to(dtype), torch.randint(0, 4, (8,), generator=generator)


def loss_of(model, rank, step, drop=False, dtype=torch.float32):
    x, y = batch(rank, step, dtype)
    return functional.cross_entropy(model(x, rank, drop).float(), y)


def flat(model):
    return torch.cat([p.detach().float().flatten() for p in model.parameters()])


def reduced(tensor, op=hvd.Average):
    """An all-reduce with a name: Horovod numbers the others, differently where ranks took part in unlike sets."""
    return hvd.allreduce(tensor, op=op, name="cases.reduced")


def same_everywhere(tensor):
    everyone = hvd.allgather(tensor.detach().clone()[None], name="cases.everyone")
    return all(torch.equal(row, everyone[0]) for row in everyone)


def close(a, b, tolerance=1e-5):
    difference = (a - b).abs().max().item()
    assert difference <= tolerance, f"differs by {difference:g}"


def gradients(model, rank, step, passes=1, drop=False):
    """Local gradients of one rank: name -> tensor or None, summed over passes as Horovod accumulates them."""
    model.zero_grad()
    for number in range(passes):
        loss_of(model, rank, step * passes + number, drop).backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def oracle(
    scheme, density, ranks, steps=STEPS, lr=0.1, passes=1, drop=False, total=False, momentum=0.0, seed=0
):
    """Algorithm 1 of M-DSGD per parameter, all ranks in one process; returns (weights, residuals by rank and name).

    A parameter without gradient on a rank contributes nothing there and keeps its residual.
    """
    model = Net()
    names = [name for name, _ in model.named_parameters()]
    zeros = {name: torch.zeros_like(p).flatten() for name, p in model.named_parameters()}
    residual = {r: {n: z.clone() for n, z in zeros.items()} for r in ranks}
    velocity = {r: {n: z.clone() for n, z in zeros.items()} for r in ranks}
    for step in range(steps):
        update = {n: z.clone() for n, z in zeros.items()}
        for r in ranks:
            local = gradients(model, r, step, passes, drop)
            for name in names:
                g = local[name]
                if g is None or not g.any():
                    continue
                velocity[r][name] = momentum * velocity[r][name] + g.flatten()
                c = residual[r][name] + velocity[r][name]
                k = max(1, -(-int(density * c.numel() * 10**6) // 10**6))
                if scheme == "topk":
                    where = c.abs().argsort(descending=True, stable=True)[:k]
                else:
                    where = ops.random_indices(seed, step, mask_key_of(name), c.numel(), k).long()
                mask = torch.zeros_like(c)
                mask[where] = 1.0
                update[name] += mask * c
                residual[r][name] = (1 - mask) * c
        factor = 1.0 if total else 1.0 / len(ranks)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p -= lr * factor * update[name].view_as(p)
    return flat(model), residual


def train(make, steps=STEPS, lr=0.1, passes=1, drop=False, rank=None, model=None, after=None, **sgd):
    """Trains Net under the optimizer that `make(model, optimizer)` gives; returns (model, optimizer)."""
    rank = hvd.rank() if rank is None else rank
    model = Net() if model is None else model
    optimizer = make(model, torch.optim.SGD(model.parameters(), lr=lr, **sgd))
    for step in range(steps):
        optimizer.zero_grad()
        for number in range(passes):
            loss_of(model, rank, step * passes + number, drop).backward()
        optimizer.step()
        if after is not None:
            after(step)
    return model, optimizer


def raises(kind, text, function):
    try:
        function()
    except kind as error:
        assert text in str(error), f"{text!r} is not in {error}"
        return
    raise AssertionError(f"{kind.__name__} with {text!r} was not raised")
