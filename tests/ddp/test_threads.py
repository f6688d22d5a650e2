"""The communication thread: which cores it runs on, and how a profiler sees it."""

import json
import sys
import textwrap

import pytest
import torch
from launch import run, spawn_gloo
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

import commhooks

CORES = """
    import json, os
    all_cores = sorted(os.sched_getaffinity(0))
    import torch
    from commhooks.ddp.comm_thread import CommThread
    from commhooks.native import ops

    def tasks():
        return {int(task) for task in os.listdir("/proc/self/task")}

    torch.ones(1 << 20).sum()
    found, before = {"all": all_cores, "main": sorted(os.sched_getaffinity(0))}, tasks()
    one = torch.zeros(1, 1, dtype=torch.int32)
    ops.write_back(torch.zeros(1 << 20), torch.ones(1, 1), one, threads=3)
    found["pool"] = [sorted(os.sched_getaffinity(task)) for task in tasks() - before]
    thread = CommThread("test")
    thread.submit(lambda: found.update(worker=sorted(os.sched_getaffinity(0))))
    thread.wait()
    found["main after"] = sorted(os.sched_getaffinity(0))
    print(json.dumps(found))
"""


@pytest.mark.native
@pytest.mark.parametrize("bind", ["true", "false"])
def test_threads_use_all_cores_where_openmp_pins_the_main_thread(bind):
    """Worker and pool took turns on the main thread's core."""
    found = json.loads(
        run([sys.executable, "-c", textwrap.dedent(CORES)], timeout=60.0, env={"OMP_PROC_BIND": bind}).stdout
    )
    assert found["main after"] == found["main"]
    assert found["worker"] == found["all"] and len(found["pool"]) >= 2
    assert all(pool == found["all"] for pool in found["pool"])
    if len(found["all"]) > 1:
        assert (found["main"] == found["all"]) == (bind == "false")


def _profiles(rank, size):
    ddp = DistributedDataParallel(nn.Linear(8, 8))
    state = commhooks.SparseState.topk(0.5, dense_crossover=False)
    commhooks.register(ddp, state)

    def step():
        ddp.zero_grad()
        ddp(torch.ones(1, 8)).sum().backward()
        assert any(p.grad.any() for p in ddp.parameters())

    step()
    every_thread = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)  # as the guide says
    with profile(activities=[ProfilerActivity.CPU], experimental_config=every_thread) as seen:
        for _ in range(3):
            step()
    step()  # without the profiler again
    assert state.error is None
    return {event.key: event.count for event in seen.key_averages() if event.key.startswith("commhooks.")}


def test_a_profiler_shows_the_phases():
    phases = dict.fromkeys(("commhooks.select", "commhooks.exchange", "commhooks.write_back"), 3)
    assert spawn_gloo(_profiles, 2) == [phases] * 2
