"""The MPI transport under a real mpiexec: equal to in_process, inside DDP jobs, and what failures end in."""

import re
import sys
import textwrap
import time
from pathlib import Path

import pytest
from launch import ROOT, clean_environment, mpiexec, run

pytestmark = pytest.mark.mpi
PROGRAMS = Path(__file__).parent / "programs"
# Seconds for jobs that should end in a fraction of that: machines may be busy.
TIMEOUT = 150.0


def test_every_scheme_over_mpi_equals_in_process_up_to_8_ranks():
    """One job of 8 ranks; fewer by sub-communicators. Every rank compares bits with its twin in threads."""
    done = mpiexec(PROGRAMS / "mpi_equals_in_process.py", 8, timeout=TIMEOUT)
    assert sorted(re.findall(r"equal P=\d rank=\d", done.stdout)) == sorted(
        f"equal P={p} rank={r}" for p in (1, 2, 3, 4, 5, 8) for r in range(p)
    )


def test_transport_calls_and_counters():
    done = mpiexec(PROGRAMS / "mpi_calls.py", 3, timeout=TIMEOUT)
    assert done.stdout.count("calls well") == 3


def test_gtopk_over_mpi_inside_a_ddp_job_started_by_mpiexec():
    done = mpiexec(PROGRAMS / "mpi_ddp.py", 3, timeout=TIMEOUT, args=["train"])
    assert done.stdout.count("trained with equal gradients") == 3
    assert done.stdout.count("conserved") == 3


@pytest.mark.parametrize("how", ["ddp", "reducer"])
def test_a_dead_rank_takes_the_job_down(how, tmp_path):
    """Under MPICH's mpiexec the launcher ends the job: the promise is a non-zero exit in seconds.

    The transport's own time-out is 300 s here, so it is not what ends the job.
    """
    env = {"COMMHOOKS_TEST_DIED_AT": str(tmp_path / "died")}
    done = mpiexec(PROGRAMS / "mpi_ddp.py", 3, timeout=TIMEOUT, args=["die", how], env=env, check=False)
    seconds = time.monotonic() - float((tmp_path / "died").read_text())
    assert not done.timed_out and done.returncode != 0 and seconds < 60.0, done.show()
    assert "step 2 done" in done.stdout and "unreachable" not in done.stdout


@pytest.mark.parametrize("how, scheme", [("ddp", "gtopk"), ("reducer", "gtopk"), ("swallow", "topk")])
def test_a_stalled_rank_ends_in_a_typed_error_and_a_non_zero_exit(how, scheme):
    """The stalled rank sleeps for 300 s: the others' time-out ends the job long before, by Abort.

    Also where the script swallows the error and ends normally: Finalize would wait for the stalled rank.
    """
    done = mpiexec(PROGRAMS / "mpi_ddp.py", 3, timeout=TIMEOUT, args=["stall", how, scheme], check=False)
    assert not done.timed_out and done.returncode != 0 and done.elapsed_s < TIMEOUT / 2, done.show()
    text = done.stdout + done.stderr
    assert "PeerTimeoutError" in text and "bucket 1, step 2" in text, done.show()
    assert "no answer from" in text and "unreachable" not in done.stdout
    if how != "reducer":
        assert "next forward: PeerTimeoutError" in done.stdout, done.show()


def test_ranks_that_disagree_end_the_job_with_both_values():
    done = mpiexec(PROGRAMS / "mpi_ddp.py", 2, timeout=TIMEOUT, args=["disagree"], check=False)
    assert not done.timed_out and done.returncode != 0
    for part in ("SettingsMismatchError", "rank 0", "rank 1", "density: 0.1 here", "0.25 on rank 1"):
        assert part in done.stderr, done.show()


HIDDEN = """
    import sys
    sys.modules["mpi4py"] = None
    import commhooks
    from commhooks import SparseState
    try:
        SparseState.gtopk(0.1, transport="mpi")
    except ImportError as error:
        print("said:", error)
"""

NO_LIBRARY = """
    import sys, types
    import commhooks
    assert "mpi4py" not in sys.modules
    package = types.ModuleType("mpi4py")
    package.__path__ = []
    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "mpi4py.MPI":
                raise RuntimeError("cannot load MPI library")
    sys.modules["mpi4py"] = package
    sys.meta_path.insert(0, Finder())
    try:
        commhooks.SparseState.gtopk(0.1, transport="mpi")
    except ImportError as error:
        print("said:", error)
"""


@pytest.mark.parametrize(
    "program, parts", [(HIDDEN, ["pip install", "mpi4py", "mpich"]), (NO_LIBRARY, ["mpich"])]
)
def test_asking_for_mpi_without_it_says_what_to_install(program, parts):
    done = run([sys.executable, "-c", textwrap.dedent(program)], timeout=60, cwd=ROOT)
    assert done.stdout.startswith("said:"), done.show()
    for part in (*parts, "pip install"):
        assert part in done.stdout


THREAD_LEVELS = """
    from mpi4py import MPI
    from commhooks import SparseState
    for level in ("SINGLE", "FUNNELED", "SERIALIZED", "MULTIPLE"):
        MPI.Query_thread = lambda: getattr(MPI, "THREAD_" + level)
        try:
            SparseState.gtopk(0.1, transport="mpi").open()
            print(level, "accepted")
        except RuntimeError as error:
            print(level, "refused:", error)
"""


def test_mpi_below_thread_serialized_is_refused():
    """The library is asked through a stand-in: MPI libraries may grant more than they are asked for."""
    done = run([sys.executable, "-c", textwrap.dedent(THREAD_LEVELS)], timeout=TIMEOUT, cwd=ROOT)
    lines = done.stdout.splitlines()
    assert lines[2:] == ["SERIALIZED accepted", "MULTIPLE accepted"], done.show()
    for line, level in zip(lines, ("SINGLE", "FUNNELED")):
        assert line.startswith(f"{level} refused:") and "MPI_THREAD_SERIALIZED" in line, done.show()


def test_serialized_is_enough():
    """Where MPI grants no more, all calls go through one lock; a DDP job of 2 ranks."""
    env = {"COMMHOOKS_TEST_THREAD_LEVEL": "serialized"}
    done = mpiexec(PROGRAMS / "mpi_ddp.py", 2, timeout=TIMEOUT, args=["train"], env=env)
    assert done.stdout.count("trained with equal gradients") == 2


def test_the_environment_of_a_job_is_clean():
    assert not [name for name in clean_environment() if name.startswith(("PMI_", "OMPI_COMM"))]


FORGOTTEN = """
    import sys
    from mpi4py import MPI
    from commhooks import SparseState
    from commhooks.transports import duplicates
    kept = [SparseState.topk(0.1, transport="mpi") for _ in range(3)]
    for state in kept:
        state.open()
    for number in range(3000):  # MPI has about 2000 communicators
        state = SparseState.topk(0.1, transport="mpi")
        state.open()
        if number % 3 == 0:
            state.close()
    made = [d.comm for d in next(iter(duplicates._pools.values()))]
    in_use = {state.reducer.transport._comm.handle for state in kept}
    assert len(duplicates._pools) == 1 and len(in_use) == 3
    sys.stdout.write(f"duplicates: {len(made)}\\n")
"""


def test_3000_states_without_close_share_a_few_communicators(tmp_path):
    """They failed at the 2046th: freeing a communicator needs all ranks, so none was ever freed."""
    program = tmp_path / "forgotten.py"
    program.write_text(textwrap.dedent(FORGOTTEN))
    done = mpiexec(program, 2, timeout=TIMEOUT)
    made = [int(n) for n in re.findall(r"duplicates: (\d+)", done.stdout)]
    assert len(made) == 2 and max(made) <= 5, done.show()


SUSPENDED = """
    import os, signal, sys, time
    import torch
    from mpi4py import MPI
    from commhooks.transports.mpi import MpiTransport
    transport = MpiTransport(timeout_s=3.0)
    comm = MPI.COMM_WORLD
    pids = comm.allgather(os.getpid())
    if comm.rank == 0 and os.fork() == 0:
        time.sleep(0.5)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(5.0)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        os._exit(0)
    if comm.rank == 1:
        time.sleep(1.0)  # stopped within this, and then late by what is left of it
    total = torch.ones(1)
    transport.all_reduce(total, tag=1, what="a suspended job")
    sys.stdout.write(f"sum {total.item()}\\n")
"""


def test_a_job_that_was_suspended_for_longer_than_the_time_limit_goes_on(tmp_path):
    program = tmp_path / "suspended.py"
    program.write_text(textwrap.dedent(SUSPENDED))
    done = mpiexec(program, 2, timeout=TIMEOUT)
    assert done.stdout.count("sum 2.0") == 2, done.show()


CUDA_AWARE = """
    import os
    from mpi4py import MPI
    from commhooks.transports.cuda_aware import VARIABLE, is_cuda_aware
    from commhooks.transports.mpi import MpiTransport
    print("itself:", is_cuda_aware(MPI), MpiTransport(device_type="cuda").device_type)
    os.environ[VARIABLE] = "1"
    print("told yes:", is_cuda_aware(MPI), MpiTransport(device_type="cuda").device_type, MpiTransport().device_type)
    os.environ[VARIABLE] = "0"
    print("told no:", is_cuda_aware(MPI))
    os.environ[VARIABLE] = "perhaps"
    try:
        is_cuda_aware(MPI)
    except ValueError as error:
        print("said:", error)
"""


def test_gpu_buffers_are_sent_directly_only_where_the_library_can():
    """The MPI of the tests is a wheel without CUDA, and says so."""
    done = run([sys.executable, "-c", textwrap.dedent(CUDA_AWARE)], timeout=TIMEOUT)
    assert "itself: False cpu" in done.stdout, done.show()
    assert "told yes: True cuda cpu" in done.stdout and "told no: False" in done.stdout
    assert "said: COMMHOOKS_MPI_CUDA_AWARE must be one of 0, 1, got 'perhaps'" in done.stdout


def test_the_streams_of_the_tensors_devices_are_waited_for(monkeypatch):
    """A thread's current device may be another GPU than that of a bucket."""
    import torch

    from commhooks.transports.mpi import MpiTransport

    waited = []

    class Stream:
        def __init__(self, device):
            self.device = device

        def synchronize(self):
            waited.append(self.device)

    class OnGpu:
        is_cuda, device = True, torch.device("cuda", 1)

    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    MpiTransport._finish_kernels(object.__new__(MpiTransport), [OnGpu(), torch.zeros(1), OnGpu()])
    assert waited == [torch.device("cuda", 1)]
