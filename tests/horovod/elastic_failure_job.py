"""Run by horovodrun's elastic launcher on 2 workers: one fails in mid-step, both go back to the commit and on.

The worker that fails raises what a lost peer raises; the other one must find out by itself. The end is compared with
runs of the same steps that were never interrupted.
"""

import horovod.torch as hvd
import torch
from torch.nn import functional

STEPS, FAILS_IN = 10, 5  # commits are after every second step: step 4 is repeated


def networks():
    torch.manual_seed(0)
    deep = torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    return deep, torch.nn.Linear(12, 4), torch.nn.Linear(12, 4)


def wrap(deep, wide, other):
    """Two of our optimizers, whose groups share a connection, and Horovod's own."""
    from commhooks import SparseState
    from commhooks.horovod import Compression, DistributedOptimizer

    options = {"dense_crossover": False, "timeout_s": 8.0}
    first, second = (
        DistributedOptimizer(
            torch.optim.SGD(network.parameters(), lr=0.05),
            network.named_parameters(),
            state=state,
            bucket_cap_mb=0.0003,
        )
        for network, state in (
            (deep, SparseState.gtopk(0.1, **options)),
            (wide, SparseState.topk(0.1, **options)),
        )
    )
    named = list(other.named_parameters())
    compression = Compression.randomk(0.1, named)
    sgd = torch.optim.SGD(other.parameters(), lr=0.05)
    return first, second, hvd.DistributedOptimizer(sgd, named, compression=compression), compression


def step(worker, number, pairs):
    generator = torch.Generator().manual_seed(100 * worker + number)
    x, y = torch.randn(8, 12, generator=generator), torch.randint(0, 4, (8,), generator=generator)
    for network, optimizer in pairs:
        optimizer.zero_grad()
        functional.cross_entropy(network(x), y).backward()
        optimizer.step()


def residuals(optimizers, compression):
    states = [optimizer.state_dict()["commhooks"] for optimizer in optimizers] + [compression.state_dict()]
    return torch.cat([tensor for state in states for _, tensor in sorted(state["residual"].items())])


def weights(models):
    return torch.cat([p.detach().flatten() for model in models for p in model.parameters()])


def main():
    torch.set_num_threads(1)
    hvd.init()
    worker = hvd.rank()  # after a reset it may be another
    models = networks()
    *optimizers, stock, compression = wrap(*models)
    names = dict(zip(("deep", "wide", "other"), models))
    state = hvd.elastic.TorchState(
        **names, first=optimizers[0], second=optimizers[1], stock=stock, compression=compression, step=0
    )
    failures, committed, restored = [], [], []

    def fail(_):  # the last layer's bucket is already on its way
        if worker == 1 and state.step == FAILS_IN and not failures:
            failures.append(state.step)
            raise hvd.HorovodInternalError("worker 1 lost something")

    models[0][0].weight.register_hook(fail)

    @hvd.elastic.run
    def train(state):
        if committed:
            restored.append((state.step, torch.equal(residuals(optimizers, compression), committed[-1])))
        while state.step < STEPS:
            step(worker, state.step, zip(models, (*optimizers, stock)))
            state.step += 1
            if state.step % 2 == 0:
                state.commit()
                committed.append(residuals(optimizers, compression))

    train(state)
    again = networks()
    *others, stock, _ = wrap(*again)
    for number in range(STEPS):
        step(worker, number, zip(again, (*others, stock)))
    same = torch.equal(weights(models), weights(again))
    steps = (optimizers[0].sparse_state.reducer.step, compression.core.steps()["weight"], state.step)
    norm = optimizers[0].sparse_state.stats()["residual_norm"] > 0
    print(f"RESULT {worker} {failures=} {restored=} {steps=} {same=} {norm=}", flush=True)
    hvd.barrier()


if __name__ == "__main__":
    main()
