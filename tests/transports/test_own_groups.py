"""Groups of ours that nobody closed, or that were destroyed together with the process's default group."""

import gc
import os
import time

import pytest
import torch
import torch.distributed as dist
from launch import spawn_gloo
from step_models import W
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from commhooks import SparseState, register
from commhooks.averaging import LocalSGD
from commhooks.transports.distributed import DistributedTransport

GRADIENT = torch.tensor([4.0, 3.0, 2.0, 1.0])


def topk(timeout_s=30.0):
    return SparseState.topk(0.25, dense_crossover=False, timeout_s=timeout_s)


def gradient(ddp):
    ddp.zero_grad()
    ddp(GRADIENT).backward()
    return ddp.module.w.grad.tolist()


def threads_and_files():
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def step(state, parameter):
    state.submit(GRADIENT.clone(), 0, (parameter,), True).wait()


def forgotten(rank, size):
    seen = []
    for trial in range(12):
        state, parameter = topk(), nn.Parameter(torch.zeros(4))
        step(state, parameter)
        if trial == 1:
            average = LocalSGD(1, timeout_s=30.0)
            average.average_parameters([parameter])
            del average
        del state
        gc.collect()
        seen.append(threads_and_files())
    return seen


def test_forgotten_states_and_averagers_leave_at_most_the_last_ones_group():
    for seen in spawn_gloo(forgotten, 2):
        # A group is four threads and five files, and there were twelve; the one before the last may still be ending.
        assert max(threads for threads, _ in seen[3:]) <= seen[0][0] + 6
        assert max(files for _, files in seen[3:]) <= seen[0][1] + 8


def closing_needs_no_other_rank(rank, size):
    transport = DistributedTransport(timeout_s=30.0)
    before = threads_and_files()[0]
    if rank == 0:
        transport.close()
        transport.close()
        assert threads_and_files()[0] <= before - 2  # those that ran its collectives
    dist.barrier()
    return True


def test_closing_ends_the_threads_and_needs_no_other_rank():
    assert spawn_gloo(closing_needs_no_other_rank, 2) == [True, True]


REMADE = 50


def of_two_ranks_again_and_again(rank, size):
    pair, other = dist.new_group([0, 1]), dist.new_group([0, 2])
    if rank != 1:
        kept = DistributedTransport(other, timeout_s=30.0)  # rank 0 has a group more than rank 1
    sums = []
    for n in range(REMADE if rank < 2 else 0):
        if n % 3 == rank:
            time.sleep(0.02)  # the other rank finds in the store what this one left there
        transport, value = DistributedTransport(pair, timeout_s=30.0), torch.tensor([rank + 1.0])
        transport.all_reduce(value, tag=0, what=f"group {n}")
        transport.close()
        sums.append(value.item())
    dist.barrier()
    if rank != 1:
        kept.close()
    return sums


def test_a_group_of_some_ranks_is_closed_and_made_again_and_again():
    """torch gave it the name of the one before, and the store the addresses of closed connections."""
    assert spawn_gloo(of_two_ranks_again_and_again, 3) == [[3.0] * REMADE, [3.0] * REMADE, []]


@pytest.fixture
def in_new_groups(tmp_path):
    """Runs a job on two ranks that may call ``enter(n)`` to make the default group, again and again."""

    def run(job):
        def ranked(rank, size):
            def enter(n):
                store = dist.FileStore(str(tmp_path / f"{job.__name__}{n}"), size)
                dist.init_process_group("gloo", store=store, rank=rank, world_size=size)

            result = job(enter)
            dist.destroy_process_group()
            return result

        return spawn_gloo(ranked, 2, init=False)

    return run


def a_cell_run_three_times(enter):
    seen = []
    for n in range(3):
        if n:
            dist.destroy_process_group()
        enter(n)
        ddp = DistributedDataParallel(W())
        register(ddp, topk())
        seen.append(gradient(ddp))
    return seen


def test_everything_is_made_anew_and_nothing_closed(in_new_groups):
    assert in_new_groups(a_cell_run_three_times) == [[[4.0, 0.0, 0.0, 0.0]] * 3] * 2


def the_state_goes_on(enter):
    enter(0)
    model, state = W(), topk()
    ddp = DistributedDataParallel(model)
    register(ddp, state)
    seen = [gradient(ddp)]
    dist.destroy_process_group()
    del ddp
    gc.collect()
    enter(1)
    ddp = DistributedDataParallel(model)
    register(ddp, state)
    return [*seen, gradient(ddp)]


def test_a_state_goes_on_in_a_new_group_without_close(in_new_groups):
    assert in_new_groups(the_state_goes_on) == [[[4.0, 0.0, 0.0, 0.0], [0.0, 6.0, 0.0, 0.0]]] * 2


def late_close(enter):
    enter(0)
    ddp, averager, parameter = DistributedDataParallel(W()), LocalSGD(1), nn.Parameter(torch.zeros(1))
    state = register(ddp, topk())
    gradient(ddp)
    averager.average_parameters([parameter])
    dist.destroy_process_group()
    state.close()  # with no group at all
    enter(1)
    parameter.data.fill_(dist.get_rank())
    averager.average_parameters([parameter])  # goes on in the new group, as a state does
    averager.close()
    state.close()
    return parameter.item()


def test_close_after_the_groups_were_made_anew_and_use_without(in_new_groups):
    assert set(in_new_groups(late_close)) == {0.5}
