"""One rank fails in its own way: `failures.py MODE`; what the others see is printed, and the job must end."""

import os
import signal
import sys
import time

import torch


def main():
    mode = sys.argv[1]
    torch.set_num_threads(1)
    import horovod.torch as hvd

    hvd.init()
    from commhooks import SparseState
    from commhooks.horovod import Compression, DistributedOptimizer

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    named = model.named_parameters
    odd = hvd.rank() == 1
    if mode == "stock-stall":
        optimizer = hvd.DistributedOptimizer(sgd, named(), compression=Compression.topk(0.1, named()))
    else:
        density = 0.2 if mode == "mismatch" and odd else 0.1
        state = SparseState.gtopk(density, timeout_s=15.0, dense_crossover=False)  # slow machines open late
        optimizer = DistributedOptimizer(sgd, named(), state=state, bucket_cap_mb=0.0003)

    def fail(_):
        if not odd or step < 2:
            return
        if mode == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if mode == "raise":
            raise ZeroDivisionError("rank 1 has a bug")
        if mode.endswith("stall"):
            time.sleep(400)  # longer than the test waits: the job must end without this rank

    model[0].weight.register_hook(fail)  # in mid-step: the last layer's bucket is already on its way
    for step in range(4):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().sum().backward()
        try:
            optimizer.step()
        except Exception as error:
            print(f"rank {hvd.rank()} saw {type(error).__name__}: {error}", flush=True)
            if mode == "stock-stall":
                os._exit(1)  # an ordinary exit waits for the stalled rank in MPI_Finalize
            raise


if __name__ == "__main__":
    main()
