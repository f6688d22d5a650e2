"""The same algorithms over gloo and MPI processes; stalled and dead peers; DDP with local hooks."""

import inspect
import logging
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launch import mpiexec, spawn_gloo
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from commhooks import SparseState, sparse_hook
from commhooks.averaging import (
    BlockMomentum,
    Every,
    LocalSGD,
    OneShot,
    PostLocalState,
    local_hook,
    post_local_hook,
)
from commhooks.errors import PeerLostError, PeerTimeoutError
from commhooks.transports import in_process, make

from .scenarios import check_all
from .workers import pair_averager

JOB = Path(__file__).parent / "mpi_job.py"
DDP_OPTIONS = inspect.signature(torch.nn.parallel.DistributedDataParallel).parameters
NO_BUFFERS = {"forward_sync_buffers" if "forward_sync_buffers" in DDP_OPTIONS else "broadcast_buffers": False}


@pytest.mark.parametrize("world_size", (1, 2, 5))
def test_in_process(world_size):
    in_process.run(world_size, check_all)


@pytest.mark.parametrize("world_size", (2, 3))
def test_gloo(world_size):
    def work(rank, size):
        transport = make("distributed", timeout_s=20.0)
        check_all(transport)
        transport.close()
        return transport.name, transport.rank

    assert spawn_gloo(work, world_size) == [("distributed", r) for r in range(world_size)]


@pytest.mark.mpi
def test_mpi():
    world_size = 3
    done = mpiexec(JOB, world_size, args=["steps"], timeout=150)
    assert all(f"rank {r} of {world_size} is well" in done.stdout for r in range(world_size))


@pytest.mark.mpi
@pytest.mark.parametrize("kind", ("local", "decentralized"))
def test_a_stalled_mpi_rank_ends_the_job_with_its_name(kind):
    done = mpiexec(JOB, 2, args=["stall", kind], timeout=50, check=False)
    assert done.returncode != 0 and not done.timed_out
    assert re.search(r"PeerTimeoutError.*after step 2", done.stderr)


@pytest.mark.mpi
@pytest.mark.parametrize("kind", ("local", "decentralized"))
def test_a_dead_mpi_rank_ends_the_job(kind):
    """MPICH's launcher does, at once; otherwise the timeout."""
    done = mpiexec(JOB, 2, args=["die", kind], timeout=50, check=False)
    assert done.returncode != 0 and not done.timed_out
    assert "rank 1 has averaged" in done.stdout


@pytest.mark.parametrize("kind", ("local", "decentralized"))
def test_stalled_and_dead_gloo_peers_are_errors_within_the_timeout(kind):
    def work(rank, size, dies):
        parameter = torch.nn.Parameter(torch.zeros(4))
        averager = pair_averager(kind, parameter, timeout_s=2.0)
        averager.average_parameters([parameter])
        started = time.monotonic()
        if rank == 1 and dies:
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 1:
            time.sleep(8)
            os._exit(0)
        try:
            averager.average_parameters([parameter])
        except (PeerTimeoutError, PeerLostError) as error:
            os.write(1, b"")  # the group is broken: leave without its destructors
            result = (type(error).__name__, str(error), time.monotonic() - started)
            dist.destroy_process_group()
            return result
        return None

    for dies in (False, True):
        outcome = spawn_gloo(work, 2, args=(dies,), check=False, timeout=40)[0]
        name, text, seconds = outcome.result
        assert "after step 2" in text and seconds < 7
        assert name == "PeerTimeoutError" or dies


def _ddp_job(rank, size, hook, state, averager_of):
    """DDP with a hook and an averager. Returns the parameters after each step."""
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
    model = DistributedDataParallel(net, **NO_BUFFERS)
    model.register_comm_hook(state, hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averager = averager_of(net)
    generator = torch.Generator().manual_seed(rank)
    history = []
    for _ in range(6):
        optimizer.zero_grad()
        model(torch.randn(8, 4, generator=generator)).square().mean().backward()
        optimizer.step()
        averager.average_parameters(model.parameters())
        history.append(torch.cat([p.detach().reshape(-1) for p in net.parameters()]).tolist())
    return history


def _bare_job(rank, size, averager_of):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    averager = averager_of(net)
    generator = torch.Generator().manual_seed(rank)
    history = []
    for _ in range(6):
        optimizer.zero_grad()
        net(torch.randn(8, 4, generator=generator)).square().mean().backward()
        optimizer.step()
        averager.average_parameters(net.parameters())
        history.append(torch.cat([p.detach().reshape(-1) for p in net.parameters()]).tolist())
    return history


AVERAGERS = {
    "local": lambda net: LocalSGD(3, module=net, timeout_s=20.0),
    "block": lambda net: BlockMomentum(0.5, 3, params=net.parameters(), module=net, timeout_s=20.0),
}


@pytest.mark.parametrize("kind", AVERAGERS)
def test_ddp_with_the_local_hook_is_the_bare_model(kind):
    averager_of = AVERAGERS[kind]
    ddp = spawn_gloo(_ddp_job, 2, args=(local_hook, None, averager_of))
    bare = spawn_gloo(_bare_job, 2, args=(averager_of,))
    assert ddp == bare
    assert ddp[0][1] != ddp[1][1] and ddp[0][2] == ddp[1][2]


def test_post_local_sgd_is_dense_until_its_step():
    def averager_of(net):
        return LocalSGD(Every(2, start=2), module=net, timeout_s=20.0)

    def never(net):
        return LocalSGD(OneShot(100), timeout_s=20.0)

    first, second = spawn_gloo(_ddp_job, 2, args=(post_local_hook, PostLocalState(2), averager_of))
    dense = spawn_gloo(_ddp_job, 2, args=(allreduce_hook, None, never))[0]
    assert first[:2] == dense[:2] and second[:2] == dense[:2]
    assert first[2] != dense[2] and second[2] != dense[2]
    equal = [a == b for a, b in zip(first, second, strict=True)]
    assert equal == [True, True, False, True, False, True]
    state = PostLocalState(4)
    state.load_state_dict({"step": 3})
    assert state.state_dict() == {"step": 3}
    with pytest.raises(ValueError, match="start.*-1"):
        PostLocalState(-1)


def _switching_job(rank, size, overflows):
    """Gradients that do not depend on the model, reduced by top-k for 3 steps at rate 1, then left local.

    Returns the largest element that has not arrived yet and the residual's norm, by step, and the warnings.
    """
    from torch.nn.parallel import DistributedDataParallel

    net = torch.nn.Linear(20, 10, bias=False)
    model = DistributedDataParallel(net, **NO_BUFFERS)
    sparse = SparseState.topk(0.05, nonfinite="skip", timeout_s=20.0, dense_crossover=False)
    model.register_comm_hook(PostLocalState(3, sparse_hook, sparse), post_local_hook)
    warnings = []
    logging.getLogger("commhooks.averaging.local_hook").warning = lambda *given: warnings.append(given[-1])
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    owed, missing, norms = torch.zeros(10, 20), [], []
    for step in range(4):
        inputs = torch.randn(size, 8, 20, generator=generator)
        if step == 2 and overflows:
            inputs[1, 0, 0] = float("inf")
        else:
            owed += inputs.sum(dim=1).mean(dim=0)
        model.zero_grad()
        model(inputs[rank]).sum().backward()
        optimizer.step()
        owed -= net.weight.grad
        missing.append(float(owed.abs().max()))
        norms.append(sparse.stats()["residual_norm"])
    torch.testing.assert_close(net.weight.grad, inputs[rank].sum(dim=0).expand(10, 20))
    assert sparse.reducer.dense_crossover is False
    sparse.close()
    return missing, norms, warnings


def test_a_sparse_hooks_residual_arrives_before_local_steps_begin():
    for missing, norms, warnings in spawn_gloo(_switching_job, 2, args=(False,)):
        assert missing[0] > 1.0 and missing[1] > 1.0 and missing[2] < 1e-4
        assert norms[1] > 1.0 and norms[2] == 0.0 and not warnings


def test_a_residual_that_stays_behind_is_logged():
    """The step that would have taken it along is thrown away."""
    for missing, norms, warnings in spawn_gloo(_switching_job, 2, args=(True,)):
        assert missing[2] > 1.0 and norms[2] > 1.0 and warnings == pytest.approx([norms[2]])
