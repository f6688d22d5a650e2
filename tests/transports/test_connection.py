"""What a transport's name stands for, how long it waits, and whether it connects the job's ranks."""

from datetime import timedelta

import pytest
import torch.distributed as dist
from launch import torchrun
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from commhooks import SparseState, register
from commhooks.averaging import LocalSGD
from commhooks.transports import (
    DEFAULT_TIMEOUT_S,
    Connection,
    connection,
    default_timeout,
    in_process,
    make,
)
from commhooks.transports.distributed import timeout_of
from commhooks.transports.launcher import launched

LAUNCHERS = {
    "torchrun": {"RANK": "1", "WORLD_SIZE": "3"},
    "horovodrun": {"HOROVOD_RANK": "1", "HOROVOD_SIZE": "3"},
    "Open MPI's mpirun": {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "3"},
    "mpiexec": {"PMI_RANK": "1", "PMI_SIZE": "3"},
    "srun": {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "3"},
}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for variables in LAUNCHERS.values():
        for name in variables:
            monkeypatch.delenv(name, raising=False)


@pytest.fixture
def two_hours(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(hours=2))
    yield
    dist.destroy_process_group()


def test_a_wait_is_as_long_as_the_groups_unless_told(two_hours):
    state = register(DistributedDataParallel(nn.Linear(2, 2)), SparseState.topk(0.1))
    averager, told = LocalSGD(1), LocalSGD(1, timeout_s=5.0)
    assert state.reducer.transport.timeout_s == averager.transport.timeout_s == 7200.0
    assert told.transport.timeout_s == 5.0
    shorter = dist.new_group([0], timeout=timedelta(seconds=90))
    assert timeout_of(shorter) == default_timeout(shorter) == 90.0 and default_timeout() == 7200.0
    assert make("distributed", process_group=shorter).timeout_s == 90.0


def test_a_wait_without_a_group(monkeypatch):
    seen = []
    assert default_timeout() == DEFAULT_TIMEOUT_S
    monkeypatch.setattr(
        "commhooks.transports.mpi.MpiTransport", lambda **o: seen.append(o) or in_process.group(1)[0]
    )
    make("mpi")
    make("mpi", timeout_s=5.0)
    assert [o["timeout_s"] for o in seen] == [DEFAULT_TIMEOUT_S, 5.0] == [300.0, 5.0]
    with pytest.raises(ValueError, match="timeout_s must be positive, got 0"):
        SparseState.topk(0.1, timeout_s=0)


def test_gloo_is_distributed_where_gloo_runs(two_hours):
    for name in ("distributed", "gloo"):
        opened = Connection(name).open()
        assert opened.name == "distributed" and opened.backend == "gloo"
    with pytest.raises(
        ValueError, match="'nccl' was asked for, and 'gloo' is what runs here, for gradients on cpu"
    ):
        Connection("nccl").open()
    with pytest.raises(ValueError, match="distributed.*gloo.*nccl.*mpi.*'pigeon'"):
        Connection("pigeon")
    state = register(DistributedDataParallel(nn.Linear(2, 2)), SparseState.dense("gloo", ddp_allreduce=True))
    assert state.left_to_ddp


@pytest.mark.parametrize("name", LAUNCHERS)
def test_what_started_the_process(name, monkeypatch):
    assert launched() is None
    for variable, value in LAUNCHERS[name].items():
        monkeypatch.setenv(variable, value)
    assert launched() == (name, 1, 3)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")  # torchrun is started last
    assert launched() == ("torchrun", 0, 2)
    monkeypatch.setenv("WORLD_SIZE", "two")
    monkeypatch.delenv("PMI_SIZE", raising=False)
    assert name in ("torchrun", "mpiexec") or launched() == (name, 1, 3)


def test_an_allocations_number_of_tasks_says_nothing_of_this_process(monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert launched() is None


@pytest.fixture
def mpi_of(monkeypatch):
    """``mpi_of(size, group)``: MPI connects so many ranks. The default group has ``group``; None: there is none."""

    def stand_in(size, group=None):
        made, closed = in_process.group(size)[0], []
        monkeypatch.setattr(made, "close", lambda: closed.append(True))
        monkeypatch.setattr("commhooks.transports.mpi.MpiTransport", lambda **options: made)
        monkeypatch.setattr(connection.dist, "is_initialized", lambda: group is not None)
        monkeypatch.setattr(connection.dist, "get_world_size", lambda given: given or group)
        monkeypatch.setattr("commhooks.transports.distributed.timeout_of", lambda given: None)
        return made, closed

    return stand_in


def started_by(monkeypatch, name, size):
    for variable in LAUNCHERS[name]:
        monkeypatch.setenv(variable, "0" if variable.endswith(("RANK", "PROCID")) else str(size))


@pytest.mark.parametrize("group", [None, 2])
@pytest.mark.parametrize("name", LAUNCHERS)
def test_mpi_that_connects_other_ranks_than_were_started(name, group, monkeypatch, mpi_of):
    """Also where a process group has as many ranks as MPI."""
    made, closed = mpi_of(2, group)
    assert make("mpi") is made  # no launcher tells
    started_by(monkeypatch, name, 3)
    with pytest.raises(ValueError) as error:
        make("mpi")
    assert f"'mpi' connects 2 ranks where {name} has 3" in str(error.value) and closed == [True]
    assert f"If {name} did not start this process, unset {list(LAUNCHERS[name])[1]}" in str(error.value)
    started_by(monkeypatch, name, 2)
    assert make("mpi") is made
    started_by(monkeypatch, name, 1)  # a shell with one task, in which mpiexec was called
    assert make("mpi") is made


@pytest.mark.parametrize("group", [None, 1, 3])
@pytest.mark.parametrize("name", LAUNCHERS)
def test_mpi_that_connects_this_process_with_itself(name, group, monkeypatch, mpi_of):
    """Another MPI's mpiexec, or none, has started the ranks of the job."""
    mpi_of(1, group)
    started_by(monkeypatch, name, 3)
    who = "torch's process group" if group == 3 else name
    with pytest.raises(ValueError, match=f"'mpi' connects 1 ranks where {who} has 3"):
        make("mpi")


@pytest.mark.parametrize("inner", [None, "mpiexec", "torchrun"])
def test_mpi_beside_a_default_process_group(inner, monkeypatch, mpi_of):
    """The group must have as many ranks as MPI, whatever the launcher says."""
    mpi_of(4, group=2)
    if inner is not None:
        started_by(monkeypatch, inner, 4)
    with pytest.raises(ValueError, match="connects 4 ranks where torch's process group has 2") as error:
        make("mpi")
    assert "unset" not in str(error.value)
    made, _ = mpi_of(4, group=4)
    assert make("mpi") is made


def test_mpi_beside_a_process_group_that_is_named(monkeypatch, mpi_of):
    """It alone counts: the job may have more ranks than the group."""
    started_by(monkeypatch, "mpiexec", 8)
    made, _ = mpi_of(4, group=8)
    assert make("mpi", process_group=4) is made
    started_by(monkeypatch, "mpiexec", 4)
    mpi_of(4, group=4)
    with pytest.raises(ValueError, match="connects 4 ranks where torch's process group has 2"):
        make("mpi", process_group=2)


@pytest.mark.parametrize("connects", [1, 4])
@pytest.mark.parametrize("outer, inner", [("srun", "mpiexec"), ("mpiexec", "torchrun"), ("srun", "torchrun")])
def test_the_innermost_of_nested_launchers_counts(outer, inner, connects, monkeypatch, mpi_of):
    """salloc and then mpiexec of fewer ranks, or a torchrun in each rank of MPI."""
    started_by(monkeypatch, outer, 2)
    started_by(monkeypatch, inner, 4)
    monkeypatch.setenv("SLURM_NTASKS", "8")
    made, _ = mpi_of(connects)
    if connects == 4:
        assert make("mpi") is made
    else:
        with pytest.raises(ValueError, match=f"connects 1 ranks where {inner} has 4"):
            make("mpi")


_AVERAGER = """
from commhooks.averaging import LocalSGD
try:
    LocalSGD(1, transport="mpi").world_size  # the transport opens at its first use
except ValueError as error:
    print(error)
"""


@pytest.mark.mpi
def test_an_averager_over_mpi_under_torchrun_does_not_average_with_itself():
    done = torchrun(_AVERAGER, 2, timeout=90)
    assert done.stdout.count("'mpi' connects 1 ranks where torchrun has 2") == 2
