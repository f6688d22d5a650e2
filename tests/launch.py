"""Start several ranks for a test, and never leave one behind.

Four ways, by cost: `spawn_gloo` forks (0.2 s for 8 ranks), `mpiexec` starts a real MPI job (0.2 s without torch, 3 s
with it), `torchrun` starts torch's own launcher (5 s), `horovod_job` one of Horovod's. Each waits no longer than `timeout`
seconds, kills what is left and raises `AssertionError` with all output.

    results = spawn_gloo(lambda rank, size: rank + size, 4)          # [4, 5, 6, 7]
    done = mpiexec("from mpi4py import MPI\nprint(MPI.COMM_WORLD.rank)\n", 3)
    assert sorted(done.stdout.split()) == ["0", "1", "2"]
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

ROOT = Path(__file__).resolve().parent.parent
# One machine, and its loopback address: without it torchrun looks the host's own name up, which may take for ever.
TORCHRUN_LOCAL = ("--standalone", "--local-addr=127.0.0.1")
# What a launcher leaves in the environment of its ranks: a nested mpiexec would take itself for one of them.
LAUNCHER_PREFIXES = ("OMPI_", "PMIX_", "PRTE_", "PMI_", "HYDI_", "HYDRA_", "TORCHELASTIC_")
LAUNCHER_NAMES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)


# Horovod's launchers: program, its switch, what comes before the script.
HOROVOD_LAUNCHERS = {
    "gloo": ("horovodrun", ["--gloo"], [sys.executable]),
    "horovodrun-mpi": ("horovodrun", ["--mpi"], [sys.executable]),
    "mpi": ("mpirun", [], [sys.executable, "-m", "mpi4py"]),
    "bare-mpi": ("mpirun", [], [sys.executable]),
}


@dataclass(frozen=True)
class Done:
    """What a job of several processes left: exit status, output, duration, and whether it had to be killed."""

    returncode: int
    stdout: str
    stderr: str
    elapsed_s: float
    timed_out: bool
    command: str

    def show(self) -> str:
        """Everything, for an assertion message."""
        how = "killed at the timeout" if self.timed_out else f"exit status {self.returncode}"
        return (
            f"{self.command}\n{how} after {self.elapsed_s:.1f} s\n"
            f"--- stdout ---\n{self.stdout}\n--- stderr ---\n{self.stderr}"
        )


@dataclass(frozen=True)
class Outcome:
    """One forked rank: `result` of the function, or `error` (its traceback), and the exit code (None: killed here)."""

    exitcode: int | None
    result: Any
    error: str | None


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment for a job: no trace of another launcher, one thread a rank, this checkout, its tests/ and scripts/ importable."""
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(LAUNCHER_PREFIXES) and name not in LAUNCHER_NAMES
    }
    env["OMP_NUM_THREADS"] = "1"
    env.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    env.setdefault("OMPI_ALLOW_RUN_AS_ROOT", "1")
    env.setdefault("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
    env.setdefault("GLOO_SOCKET_IFNAME", "lo")
    env["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts"), *filter(None, [env.get("PYTHONPATH")])]
    )
    env.update(extra or {})
    return env


def mpiexec_path() -> Path:
    """The `mpiexec` of this environment: another one gives N jobs of size 1 without a word."""
    return Path(sys.executable).parent / "mpiexec"


def why_no_mpi() -> str | None:
    """None where MPI jobs can be started, otherwise the reason (nothing is imported into this process)."""
    import importlib.util

    if importlib.util.find_spec("mpi4py") is None:
        return "mpi4py is not installed (pip install mpich mpi4py)"
    if not mpiexec_path().exists():
        return f"there is no mpiexec beside {sys.executable} (pip install mpich)"
    return None


def why_no_horovod() -> str | None:
    """None where Horovod works, otherwise the reason. A process of its own tries: one built for another torch may crash."""
    import importlib.util

    if importlib.util.find_spec("horovod") is None:
        return "Horovod is not installed (scripts/install_horovod)"
    command = [sys.executable, "-c", "import horovod.torch"]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, errors="replace")
    if done.returncode == 0:
        return None
    last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return f"Horovod does not work with this torch (scripts/install_horovod): {last}"


def run(
    command: Sequence[str],
    *,
    timeout: float,
    env: Mapping[str, str] | None = None,
    cwd: Path | str | None = None,
    check: bool = True,
) -> Done:
    """Run a command in its own process group; at the timeout the whole group is killed."""
    started = time.monotonic()
    process = subprocess.Popen(
        list(command),
        cwd=cwd or ROOT,
        env=clean_environment(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    timed_out = False
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        timed_out = True
        _kill_group(process.pid)
        stdout, stderr = process.communicate()
    finally:
        _kill_group(process.pid)
    elapsed_s = time.monotonic() - started
    done = Done(process.returncode, stdout, stderr, elapsed_s, timed_out, " ".join(map(str, command)))
    if check and (timed_out or done.returncode != 0):
        raise AssertionError(done.show())
    return done


def mpiexec(
    script: Path | str,
    n: int,
    timeout: float = 60.0,
    args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    check: bool = True,
    cwd: Path | str | None = None,
) -> Done:
    """Run `script` (a path, or the text of a program) on `n` ranks: `mpiexec -n N python -m mpi4py script args`.

    Args:
        script: path of a Python file, or source text (recognised by its newline).
        n: number of ranks.
        timeout: seconds for the whole job.
        args: given to the script.
        env: added to the environment of the ranks.
        check: raise `AssertionError` with all output unless the exit status is 0.
        cwd: working directory of the job; the checkout's root if None.
    """
    launcher = [str(mpiexec_path()), "-n", str(n), sys.executable, "-m", "mpi4py"]
    with tempfile.TemporaryDirectory(prefix="commhooks-test-") as folder:
        command = [*launcher, _as_file(script, folder), *map(str, args)]
        return run(command, timeout=timeout, env=env, check=check, cwd=cwd)


def torchrun(
    script: Path | str,
    n: int,
    timeout: float = 60.0,
    args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    check: bool = True,
    cwd: Path | str | None = None,
) -> Done:
    """Run `script` (a path, or the text of a program) on `n` ranks under torchrun; arguments as in `mpiexec`."""
    launcher = [sys.executable, "-m", "torch.distributed.run", *TORCHRUN_LOCAL, f"--nproc-per-node={n}"]
    with tempfile.TemporaryDirectory(prefix="commhooks-test-") as folder:
        command = [*launcher, _as_file(script, folder), *map(str, args)]
        return run(command, timeout=timeout, env=env, check=check, cwd=cwd)


def horovod_job(
    launcher: str,
    n: int,
    script: Path | str,
    *args: Any,
    timeout: float = 150.0,
    env: Mapping[str, str] | None = None,
    check: bool = True,
    options: Sequence[str] = (),
) -> Done:
    """Run `script` (a path) on `n` ranks under one of HOROVOD_LAUNCHERS, with more `options` for it."""
    program, switch, python = HOROVOD_LAUNCHERS[launcher]
    binaries = Path(sys.executable).parent
    path = os.pathsep.join([str(binaries), os.environ.get("PATH", "")])  # horovodrun finds mpirun there
    settings = {"PATH": path, "COMMHOOKS_TEST_RANKS": str(n), **(env or {})}
    command = [
        str(binaries / program),
        "-np",
        str(n),
        *switch,
        *options,
        *python,
        str(script),
        *map(str, args),
    ]
    return run(command, timeout=timeout, env=settings, check=check)


def spawn_gloo(
    fn: Callable[..., Any],
    n: int,
    args: Sequence[Any] = (),
    timeout: float = 60.0,
    check: bool = True,
    init: bool = True,
) -> list[Any]:
    """Run `fn(rank, n, *args)` in `n` forked processes joined in a gloo process group.

    Forking needs a parent without torch threads (conftest.py sets one thread) and without MPI.

    Args:
        fn: any callable, closures too; what it returns must pickle.
        n: number of ranks.
        args: given to `fn` after rank and size.
        timeout: seconds for all ranks together; then the ranks print their stacks and are killed.
        check: raise `AssertionError` with the tracebacks unless every rank ended well.
        init: make the default process group (a file store, gloo) before `fn` and destroy it afterwards.

    Returns:
        The ranks' results in order; with `check=False` a list of `Outcome`.
    """
    if "mpi4py.MPI" in sys.modules:
        raise RuntimeError("this process has started MPI: forked ranks would share its connections")
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="commhooks-gloo-") as folder:
        ranks = [
            context.Process(target=_forked_rank, args=(fn, rank, n, args, folder, timeout, init), daemon=True)
            for rank in range(n)
        ]
        for rank in ranks:
            rank.start()
        deadline = time.monotonic() + timeout
        failed = False
        while any(rank.is_alive() for rank in ranks) and time.monotonic() < deadline:
            if check and not failed and any(rank.exitcode not in (None, 0) for rank in ranks):
                failed = True
                deadline = min(deadline, time.monotonic() + 3.0)  # the others may have something to say
            time.sleep(0.01)
        return _collect(ranks, folder, check, timeout)


def _collect(ranks: Sequence[Any], folder: str, check: bool, timeout: float) -> list[Any]:
    alive = [rank.is_alive() for rank in ranks]
    for rank in ranks:
        if rank.is_alive():
            rank.kill()
        rank.join()
    outcomes = []
    for number, (rank, was_alive) in enumerate(zip(ranks, alive)):
        result, error = None, None
        path = Path(folder) / f"result{number}"
        if path.exists():
            result, error = pickle.loads(path.read_bytes())
        outcomes.append(Outcome(None if was_alive else rank.exitcode, result, error))
    if not check:
        return outcomes
    bad = [(number, outcome) for number, outcome in enumerate(outcomes) if outcome.exitcode != 0]
    if bad:
        lines = [f"{len(bad)} of {len(ranks)} ranks failed (time limit {timeout} s)"]
        for number, outcome in bad:
            how = "killed: still running" if outcome.exitcode is None else f"exit code {outcome.exitcode}"
            lines.append(f"--- rank {number}: {how} ---\n{outcome.error or ''}")
        raise AssertionError("\n".join(lines))
    return [outcome.result for outcome in outcomes]


def _forked_rank(
    fn: Callable[..., Any], rank: int, n: int, args: Sequence[Any], folder: str, timeout: float, init: bool
) -> None:
    # A collection here would run the destructors of the parent's garbage: a process group joins threads that a
    # forked process does not have, and waits for ever.
    gc.freeze()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    faulthandler.dump_traceback_later(max(0.1, timeout - 0.5), file=sys.__stderr__)
    path = Path(folder) / f"result{rank}"
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        if init:
            store = dist.FileStore(str(Path(folder) / "store"), n)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=n)
        result = fn(rank, n, *args)
        if init and dist.is_initialized():
            dist.destroy_process_group()
        _write(path, (result, None))
    except BaseException:
        _write(path, (None, traceback.format_exc()))
        sys.stderr.flush()
        os._exit(1)  # not through destructors: a broken group may wait in them
    sys.stdout.flush()
    os._exit(0)


def _write(path: Path, content: tuple[Any, str | None]) -> None:
    part = path.with_suffix(".part")
    part.write_bytes(pickle.dumps(content))
    part.replace(path)


def _as_file(script: Path | str, folder: str) -> str:
    if isinstance(script, Path) or "\n" not in script:
        return str(script)
    path = Path(folder) / "program.py"
    path.write_text(script)
    return str(path)


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
