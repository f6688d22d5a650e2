"""The helpers that start ranks: results, failures with their output, timeouts that kill."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launch import ROOT, TORCHRUN_LOCAL, clean_environment, mpiexec, run, spawn_gloo, torchrun


def _sum_of_ranks(rank, size, offset):
    tensor = torch.tensor([float(rank + offset)])
    dist.all_reduce(tensor)
    return rank, tensor.item()


def test_forked_ranks_share_a_group_and_return_in_order():
    assert spawn_gloo(_sum_of_ranks, 3, args=(1,)) == [(0, 6.0), (1, 6.0), (2, 6.0)]


def test_a_forked_rank_that_raises_or_hangs_is_reported():
    def fail(rank, size):
        if rank == 1:
            raise ValueError("rank one has had enough")
        time.sleep(30)

    started = time.monotonic()
    with pytest.raises(AssertionError, match="rank one has had enough"):
        spawn_gloo(fail, 2, init=False)
    assert time.monotonic() - started < 10
    with pytest.raises(AssertionError, match="still running"):
        spawn_gloo(lambda rank, size: time.sleep(30), 2, init=False, timeout=1)


def test_outcomes_tell_a_killed_rank_from_one_that_ended():
    def one_dies(rank, size):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return "well"

    outcomes = spawn_gloo(one_dies, 2, init=False, check=False)
    assert [outcome.exitcode for outcome in outcomes] == [0, -signal.SIGKILL]
    assert outcomes[0].result == "well"


@pytest.mark.mpi
def test_mpiexec_gives_one_job_of_the_size_asked_for():
    program = "from mpi4py import MPI\nprint(f'[{MPI.COMM_WORLD.size} {MPI.COMM_WORLD.rank}]', flush=True)\n"
    done = mpiexec(program, 3)
    assert sorted(re.findall(r"\[\d \d\]", done.stdout)) == [
        "[3 0]",
        "[3 1]",
        "[3 2]",
    ]  # lines may interleave


@pytest.mark.mpi
def test_mpiexec_shows_the_output_of_a_failed_job_and_kills_a_hanging_one():
    program = textwrap.dedent("""
        import sys, time
        from mpi4py import MPI
        if "fail" in sys.argv and MPI.COMM_WORLD.rank == 1:
            raise ValueError("rank one has had enough")
        print("here", flush=True)
        time.sleep(60)
    """)
    with pytest.raises(AssertionError, match="rank one has had enough"):
        mpiexec(program, 2, args=["fail"], timeout=30)
    started = time.monotonic()
    done = mpiexec(program, 2, timeout=3, check=False)
    assert done.timed_out and done.stdout.count("here") == 2
    assert time.monotonic() - started < 10


def test_every_program_that_starts_torchrun_gives_it_the_local_address():
    """Without it torchrun asks for the address of the host's name, and hangs where that does not resolve."""
    started = re.compile(r"torch\.distributed\.run\b")
    files = [f for folder in ("scripts", "tests", ".ci") for f in (ROOT / folder).rglob("*") if f.is_file()]
    texts = {file: file.read_text(errors="replace") for file in files if "__pycache__" not in file.parts}
    starting = {file: text for file, text in texts.items() if started.search(text) and file != Path(__file__)}
    assert len(starting) >= 3
    assert [file.name for file, text in starting.items() if "--local-addr=127.0.0.1" not in text] == []


@pytest.mark.network
def test_torchrun_where_the_hosts_name_does_not_resolve(tmp_path):
    """A host whose name nobody knows and that has no name server: the helper's job starts all the same."""
    (tmp_path / "resolv.conf").write_text("")
    (tmp_path / "hello.py").write_text(
        "import os, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\nprint('rank', dist.get_rank(), 'is there')\n"
    )
    job = [sys.executable, "-m", "torch.distributed.run", *TORCHRUN_LOCAL, "--nproc-per-node=2", "hello.py"]
    inside = f"hostname nowhere.invalid; mount --bind resolv.conf /etc/resolv.conf; exec {' '.join(job)}"
    done = run(["unshare", "-um", "sh", "-c", inside], timeout=90, cwd=tmp_path)
    assert done.stdout.count("is there") == 2, done.show()


def test_torchrun_gives_every_rank_its_place():
    program = 'import os\nprint("rank " + os.environ["RANK"] + " of " + os.environ["WORLD_SIZE"])\n'
    done = torchrun(program, 2)
    assert sorted(re.findall(r"rank \d of \d", done.stdout)) == ["rank 0 of 2", "rank 1 of 2"]


def test_a_launchers_variables_do_not_reach_the_ranks(monkeypatch):
    for name in ("PMI_RANK", "OMPI_COMM_WORLD_SIZE", "RANK", "HYDRA_LAUNCHER"):
        monkeypatch.setenv(name, "7")
        assert name not in clean_environment()
    assert clean_environment({"RANK": "1"})["RANK"] == "1"


# conftest.py needs no more of torch, and importing the real one five times takes seconds
TORCH = """
class cuda:
    is_available = staticmethod(lambda: False)
def set_num_threads(count):
    pass
"""


def _pytest(tmp_path: Path, text: str, **env: str) -> subprocess.CompletedProcess:
    """Run pytest on one file with a copy of the project's conftest."""
    for name in ("conftest.py", "launch.py"):
        (tmp_path / name).write_text((ROOT / "tests" / name).read_text())
    (tmp_path / "torch.py").write_text(TORCH)
    (tmp_path / "test_it.py").write_text(textwrap.dedent(text))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:hypothesispytest",
        str(tmp_path),
    ]
    return run(command, timeout=60, env={"COMMHOOKS_REQUIRE": "", **env}, check=False, cwd=tmp_path)


def test_a_required_marker_turns_skips_into_failures(tmp_path):
    skipping = """
        import pytest
        @pytest.mark.cuda
        def test_device():
            pytest.skip("nothing here")
    """
    assert _pytest(tmp_path, skipping).returncode == 0
    done = _pytest(tmp_path, skipping, COMMHOOKS_REQUIRE="cuda", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1 and "required by COMMHOOKS_REQUIRE: no CUDA" in done.stdout
    by_itself = skipping.replace("cuda", "slow")
    assert _pytest(tmp_path, by_itself).returncode == 0
    done = _pytest(tmp_path, by_itself, COMMHOOKS_REQUIRE="slow")
    assert done.returncode == 1 and "1 failed" in done.stdout and "nothing here" in done.stdout
    done = _pytest(tmp_path, "def test_plain(): pass", COMMHOOKS_REQUIRE="cuda")
    assert done.returncode == 1 and "no test passed for ['cuda']" in done.stdout
    done = _pytest(tmp_path, "def test_plain(): pass", COMMHOOKS_REQUIRE="cudda")
    assert done.returncode != 0 and "cudda" in done.stderr


def test_the_network_can_be_required(tmp_path):
    """Where `ip` is missing its tests are skipped, or fail where CI demands them."""
    marked = """
        import pytest
        @pytest.mark.network
        def test_network():
            raise AssertionError("must not run")
    """
    env = {"PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}:{ROOT / 'scripts'}", "PATH": str(tmp_path)}
    done = _pytest(tmp_path, marked, **env)
    assert done.returncode == 0 and "1 skipped" in done.stdout
    done = _pytest(tmp_path, marked, COMMHOOKS_REQUIRE="network", **env)
    assert done.returncode == 1 and "required by COMMHOOKS_REQUIRE: `ip` is missing" in done.stdout


def test_a_horovod_for_another_torch_is_said_and_skipped(tmp_path):
    (tmp_path / "horovod" / "torch").mkdir(parents=True)
    (tmp_path / "horovod" / "__init__.py").touch()
    (tmp_path / "horovod" / "torch" / "__init__.py").write_text(
        "raise ImportError('undefined symbol: _ZN3c10')"
    )
    env = {"PYTHONPATH": f"{tmp_path}:{ROOT / 'tests'}:{ROOT}", "COMMHOOKS_PYTHON": sys.executable}
    code = "import os, launch; launch.clean_environment = lambda: dict(os.environ); print(launch.why_no_horovod())"
    reason = run([sys.executable, "-c", code], timeout=60.0, env=env).stdout
    assert "scripts/install_horovod" in reason and "undefined symbol" in reason
    few = run([str(ROOT / "scripts" / "test"), "--collect-only", "-q", __file__], timeout=100.0, env=env)
    assert "test: no Horovod that works with this torch: its tests are skipped" in few.stderr, few.show()
