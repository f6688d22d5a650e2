"""Jobs of two forked ranks that end as scripts do, through Python's own shutdown. argv: kind, repeats.

A thread of gloo that holds a collective's result while Python ends is a race that tests win once in
hundreds of runs. Here it is certain: a callback that runs on that thread, before it lets go, sleeps on.
Prints for each run, as JSON, the exit status of both ranks, and how many threads of gloo each of them had
left after its exit handlers.
"""

import atexit
import gc
import itertools
import json
import os
import sys
import tempfile
import threading
import time


def gloo_threads():
    names = [open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")]
    return names.count("pt_gloo_runloop")


class SlowShutdown:
    """Makes the shutdown of the module that holds it last."""

    def __del__(self):
        time.sleep(SHUTDOWN_S)


def report():
    if "COMMHOOKS_TEST_THREADS" in os.environ:
        open(os.environ["COMMHOOKS_TEST_THREADS"], "w").write(str(gloo_threads()))


atexit.register(report)  # registered first, hence run last

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402

import commhooks  # noqa: E402
from commhooks.averaging import LocalSGD  # noqa: E402

RANKS, LIMIT_S = 2, 60.0
HOLD_S, SHUTDOWN_S = 0.5, 2.0  # gloo's thread asks for the interpreter while that shuts down
ending = threading.Event()
NUMEL = 100_000  # large enough for gloo's own all-reduce


def hold_results(rank, store):
    """Every asynchronous all-reduce is complete for who waits, while gloo's thread still holds its tensors.

    Rank 1 starts after rank 0 has attached its callback, which therefore runs on gloo's thread. Rank 1 may
    come too late for its own, which then runs at once on the calling thread and holds nothing.
    """
    start, calls = dist.all_reduce, itertools.count()

    def all_reduce(*arguments, **options):
        call, caller = next(calls), threading.get_ident()
        if rank == 1:
            store.wait([f"attached{call}"])
        future = start(*arguments, **options).get_future()

        def hold(done):
            if threading.get_ident() != caller:
                ending.wait()
                time.sleep(HOLD_S)
            return done.value()

        future.then(hold)
        if rank == 0:
            store.set(f"attached{call}", "")

        class Held:
            def wait(self, timeout=None):
                future.wait()

        return Held()

    dist.all_reduce = all_reduce


def step(state, parameter):
    """As DDP's hook does for a model of one bucket."""
    state.submit(torch.ones(NUMEL), 0, (parameter,), True).wait()


def state_without_close():
    state, parameter = commhooks.SparseState.dense(timeout_s=30.0), nn.Parameter(torch.ones(NUMEL))
    step(state, parameter)
    return state, parameter  # alive to the end, as in a script


def averager_without_close():
    averager = LocalSGD(1, timeout_s=30.0)
    averager.average_parameters([nn.Parameter(torch.ones(NUMEL))])
    return averager


def forked_child():
    """What a child does with its parent's groups at its own end: nothing."""
    state, parameter = state_without_close()
    pid = os.fork()
    if pid == 0:
        del os.environ["COMMHOOKS_TEST_THREADS"]
        atexit._run_exitfuncs()
        state.close()
        os._exit(0)
    assert wait_for(pid) == 0
    ending.set()
    step(state, parameter)
    return state


def command_line():
    """As `commhooks bench`: its group is destroyed, and still referenced, as torch does after DDP used it."""
    from commhooks import __main__ as program

    group = dist.group.WORLD

    def main():
        dist.all_reduce(torch.ones(NUMEL), async_op=True).wait()
        ending.set()
        dist.destroy_process_group()
        return 0 if group else 1

    program.main = main
    program.program()


def wait_for(pid):
    """Its exit status; minus the signal that ended it; None if it had to be killed."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return None


def read(path):
    return int(open(path).read()) if os.path.exists(path) else None


KINDS = {f.__name__: f for f in (state_without_close, averager_without_close, forked_child, command_line)}

if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # else every rank collects what was imported, again and again
    for repeat in range(int(sys.argv[2])):
        folder, pids = tempfile.mkdtemp(), []
        for rank in range(RANKS):
            pids.append(os.fork())
            if pids[-1] == 0:
                os.environ["COMMHOOKS_TEST_THREADS"] = f"{folder}/threads{rank}"
                store = dist.FileStore(f"{folder}/store", RANKS)
                dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
                default = gloo_threads()
                hold_results(rank, store)
                kept = KINDS[sys.argv[1]]()
                assert gloo_threads() > default
                slow = SlowShutdown()
                atexit.register(ending.set)
                sys.exit()
        statuses = [wait_for(pid) for pid in pids]
        left = [read(f"{folder}/threads{rank}") for rank in range(RANKS)]
        print(json.dumps([statuses, left]), flush=True)
