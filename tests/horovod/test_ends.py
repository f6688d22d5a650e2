"""How Horovod jobs with our optimizer end: well, by sys.exit() of one rank, and in which order handlers run."""

from pathlib import Path

import pytest
from launch import horovod_job

JOB = Path(__file__).resolve().parent / "ends.py"
FINALIZED = "MPI is being finalized, because a rank of the job has exited or called hvd.shutdown()"


@pytest.fixture
def jobs(request, repeats):
    """How many jobs a test starts: each takes seconds, so that they are repeated under --stress alone."""
    return repeats if request.config.getoption("--stress") else 1


def test_a_script_that_shuts_horovod_down_ends_well(jobs):
    """One rank still exchanges when the other shuts down, which finalizes MPI on both."""
    for _ in range(jobs):
        done = horovod_job("mpi", 2, JOB, "shutdown", timeout=100.0)
        for rank in range(2):
            text = f"rank {rank} saw rank {rank}, after the end, all-reduce: {FINALIZED}"
            assert text in done.stdout, done.show()
            assert f"rank {rank}: closed at the end" in done.stdout, done.show()


@pytest.mark.parametrize(("mode", "step"), [("mid-step", 3), ("between", 2)])
def test_the_others_are_told_when_a_rank_exits(mode, step, jobs):
    """They were left in their exchange, or crashed in it when MPI was finalized."""
    for _ in range(jobs):
        done = horovod_job("mpi", 2, JOB, mode, timeout=100.0, check=False)
        assert not done.timed_out and done.returncode in (1, 3), done.show()
        text = f"rank 0 saw rank 0, bucket 0, step {step}"
        assert text in done.stdout and FINALIZED in done.stdout, done.show()


def test_the_optimizer_leaves_before_horovod_in_an_elastic_job(jobs):
    """Horovod and our process group start after the optimizer there, and handlers run in reverse order."""
    for _ in range(jobs):
        done = horovod_job("gloo", 2, JOB, "elastic", timeout=100.0)
        for rank in range(2):
            assert f"rank {rank}: Horovod's handler, closed" in done.stdout, done.show()
            assert f"rank {rank}: closed at the end" in done.stdout, done.show()
