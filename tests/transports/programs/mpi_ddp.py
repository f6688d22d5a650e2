"""DDP on gloo with an MPI hook in a job started by mpiexec, and what may go wrong in it.

Arguments: train | die | stall | disagree, then ddp | reducer | swallow (ddp, and the script ends as if nothing had
been), then the scheme.
"""

import os
import sys
import time
from pathlib import Path

import mpi4py

mpi4py.rc.thread_level = os.environ.get("COMMHOOKS_TEST_THREAD_LEVEL", "multiple")
import ddp_cases as cases  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from mpi4py import MPI  # noqa: E402

from commhooks import Bucket, ErrorFeedback  # noqa: E402
from commhooks.transports.mpi import MpiTransport  # noqa: E402

torch.set_num_threads(1)
WHAT, HOW, SCHEME = (*sys.argv[1:], *("train", "ddp", "gtopk")[len(sys.argv) - 1 :])
# Where a rank dies it is the launcher that ends the job: the survivors' own time-out would be far too late.
TIMEOUT_S = {"stall": 3.0, "die": 300.0}.get(WHAT, 60.0)
comm = MPI.COMM_WORLD


def say(text):
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def join_gloo():
    """Rank and size from MPI, the store's port by broadcast."""
    store = dist.TCPStore("127.0.0.1", 0, comm.size, True, wait_for_workers=False) if comm.rank == 0 else None
    port = comm.bcast(store.port if store else None)
    store = store or dist.TCPStore("127.0.0.1", port, comm.size, False)
    dist.init_process_group("gloo", store=store, rank=comm.rank, world_size=comm.size)


def trouble(reduce, reducer):
    """Wraps ``reduce``: in bucket 1 of the third step rank 1 dies or sleeps."""

    def wrapped(bucket, scale=1.0):
        if comm.rank == 1 and bucket.index == 1 and reducer.step == 2:
            if WHAT == "die":
                Path(os.environ["COMMHOOKS_TEST_DIED_AT"]).write_text(str(time.monotonic()))
                os.kill(os.getpid(), 9)
            if WHAT == "stall":
                time.sleep(300)
        return reduce(bucket, scale)

    return wrapped


def main_reducer():
    from ranks import reducer

    scheme = {"topk": "union"}.get(SCHEME, SCHEME)
    red = reducer(scheme, MpiTransport(timeout_s=TIMEOUT_S), 0.2)
    reduce = trouble(red.reduce, red)
    try:
        for _ in range(3):
            for index in range(3):
                reduce(Bucket(index, torch.ones(20), (f"p{index}",), (20,), index == 2))
            say(f"step {red.step} done")
    except RuntimeError as error:
        red.transport.fail(error)
        raise
    say("unreachable")


def main_ddp():
    join_gloo()
    density = 0.25 if WHAT == "disagree" and comm.rank == 1 else 0.1
    ddp, state = cases.sparse_ddp(SCHEME, density, ErrorFeedback(0.5), transport="mpi", timeout_s=TIMEOUT_S)
    state.reducer.reduce = trouble(state.reducer.reduce, state.reducer)
    data = cases.Data(comm.rank)
    if WHAT == "train":
        for step in range(4):
            update = cases.check_step(ddp, state, [data(step)], beta=0.5)
            cases.sgd_step(ddp, update)
        say("conserved")
        assert cases.same_on_all_ranks(update) and update.any()
        assert state.stats()["bytes_sent"] > 0 or comm.size == 1
        say("trained with equal gradients")
        state.close()
        dist.destroy_process_group()
        return
    try:
        for step in range(3):
            cases.loss_of(ddp, data(step)).backward()
            say(f"step {step + 1} done")
    except RuntimeError:
        if WHAT == "stall":
            try:
                cases.loss_of(ddp, data(0))
            except Exception as error:
                say(f"next forward: {type(error).__name__} {error}")
        if HOW == "swallow":
            return
        raise
    say("unreachable")


main_reducer() if HOW == "reducer" else main_ddp()
