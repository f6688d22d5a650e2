"""A job of ranks that end in one of several ways: `ends.py MODE`. Each rank prints what it sees."""

import atexit
import os
import sys
import time

import torch

LIMIT_S = 2.0  # of both waits at the end
kept = []


def report():
    """Runs after all other exit handlers."""
    sync = kept[0].gradient_sync
    print(
        f"rank {RANK}: {'open' if sync.state.reducer.connection.is_open else 'closed'} at the end", flush=True
    )


def slow_waits():
    """Rank 1 is still in its last exchange when rank 0 shuts Horovod down."""
    from commhooks.transports.mpi import MpiTransport

    wait = MpiTransport._wait

    def slow(self, requests, what, peers):
        if "step 3" in what:
            time.sleep(LIMIT_S / 4)
        wait(self, requests, what, peers)

    MpiTransport._wait = slow


def main(mode):
    global RANK
    torch.set_num_threads(1)
    import horovod.torch as hvd

    atexit.register(report)
    hvd.init()
    RANK = hvd.rank()
    from commhooks import PeerLostError, SparseState
    from commhooks.horovod import DistributedOptimizer, gradient_sync
    from commhooks.transports import finalization

    gradient_sync._LEAVE_S = finalization.GRACE_S = LIMIT_S
    if (
        mode == "elastic"
    ):  # the transport opens at the first gradient, after a reset has initialized Horovod anew
        os.environ["HOROVOD_ELASTIC"] = "1"
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    state = SparseState.gtopk(0.1, timeout_s=60.0, dense_crossover=False)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = DistributedOptimizer(sgd, model.named_parameters(), state=state, bucket_cap_mb=0.0003)
    kept.append(optimizer)
    if mode == "elastic":
        atexit.register(lambda: print(f"rank {RANK}: Horovod's handler, {states(optimizer)}", flush=True))
    if mode == "shutdown" and RANK == 1:
        slow_waits()
    leaves = RANK == 1 and mode in ("mid-step", "between")
    for step in range(4):
        if leaves and step == 2 and mode == "between":
            sys.exit(3)
        optimizer.zero_grad()
        try:
            model(torch.randn(4, 8)).square().sum().backward()
            if leaves and step == 2:
                sys.exit(3)
            optimizer.step()
        except PeerLostError as error:
            print(f"rank {RANK} saw {error}", flush=True)
            raise
    if mode == "shutdown":
        hvd.shutdown()
        try:
            state.reducer.transport.all_reduce(torch.zeros(1), tag=0, what="after the end")
        except PeerLostError as error:
            print(f"rank {RANK} saw {error}", flush=True)


def states(optimizer):
    return "closed" if not optimizer.gradient_sync.state.reducer.connection.is_open else "open"


if __name__ == "__main__":
    main(sys.argv[1])
