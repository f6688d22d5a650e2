"""Run by horovodrun's elastic launcher: 2 workers, a third joins, training goes on. `elastic_job.py FOLDER`."""

import sys
import time
from pathlib import Path

import horovod.torch as hvd
import torch
from torch.nn import functional

FOLDER = Path(sys.argv[1])
AFTER = 6  # steps to do once the third worker is there


def main():
    torch.set_num_threads(1)
    hvd.init()
    from commhooks import SparseState
    from commhooks.horovod import Compression, DistributedOptimizer

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    other = torch.nn.Linear(12, 4)
    optimizer = DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.05),
        model.named_parameters(),
        state=SparseState.gtopk(0.1, dense_crossover=False, timeout_s=20.0),
    )
    named = [(f"other.{name}", p) for name, p in other.named_parameters()]
    compression = Compression.randomk(0.1, named)
    stock = hvd.DistributedOptimizer(
        torch.optim.SGD(other.parameters(), lr=0.05), named, compression=compression
    )
    state = hvd.elastic.TorchState(
        model=model, optimizer=optimizer, other=other, stock=stock, compression=compression, step=0, goal=0
    )

    @hvd.elastic.run
    def train(state):
        while state.goal == 0 or state.step < state.goal:
            generator = torch.Generator().manual_seed(100 * hvd.rank() + state.step)
            x = torch.randn(8, 12, generator=generator)
            y = torch.randint(0, 4, (8,), generator=generator)
            for network, its_optimizer in ((model, optimizer), (other, stock)):
                its_optimizer.zero_grad()
                functional.cross_entropy(network(x), y).backward()
                its_optimizer.step()
            state.step += 1
            if state.step == 5:
                (FOLDER / "grow").touch()
            if hvd.size() == 3 and state.goal == 0:
                state.goal = state.step + AFTER
            time.sleep(0.05)
            state.commit()

    train(state)
    weights = torch.cat([p.detach().flatten() for p in (*model.parameters(), *other.parameters())])
    everyone = hvd.allgather(weights[None], name="weights")
    facts = (optimizer.sparse_state.reducer.step, compression.core.steps()["other.weight"], state.step)
    steps = hvd.allgather(torch.tensor([facts]), name="steps")
    norm = optimizer.sparse_state.stats()["residual_norm"]
    norms = hvd.allgather(torch.tensor([[norm, compression.stats()["residual_norm"]]]), name="norms")
    if hvd.rank() == 0:
        same = all(torch.equal(row, everyone[0]) for row in everyone)
        print(
            f"RESULT size={hvd.size()} same={same} steps={steps.tolist()} norms={norms.tolist()}", flush=True
        )


if __name__ == "__main__":
    main()
