"""A run of `scripts/bench network` that is interrupted while its ranks are at work leaves no namespace and no process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from benchmarks.harness.namespaces import PREFIX, sweep
from launch import ROOT, clean_environment

PROGRAM = """
from benchmarks.command import main
main("network --allow-reference --ranks 2 --networks 1gbit --models resnet20 --schemes dense --steps 1000000 --budget 60 --no-exchange".split())
"""


def descendants(pid):
    """The processes below `pid`: launcher, its helpers, ranks."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError):  # it has just ended
            continue
    found, new = set(), {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return found


def alive(pids):
    """Those of `pids` that still run; a process that ended and waits for its parent does not."""
    states = {}
    for pid in pids:
        try:
            states[pid] = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            continue
    return {pid for pid, state in states.items() if state != "Z"}


def namespaces(pid):
    names = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.split()
    return [name for name in names if name.startswith(f"{PREFIX}-{pid}-")]


def sent_bytes(namespace):
    command = ["ip", "netns", "exec", namespace, "cat", "/sys/class/net/eth0/statistics/tx_bytes"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def until(condition, timeout_s, what):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come within {timeout_s} s"
        time.sleep(0.05)


def is_launched(pid):
    """Whether the checks of the network are over and the ranks' launcher runs."""

    def of_job(each):
        try:
            return b"benchmarks.harness.rank" in Path(f"/proc/{each}/cmdline").read_bytes()
        except OSError:
            return False

    return any(map(of_job, descendants(pid)))


@pytest.mark.network
@pytest.mark.mpi
@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGKILL), ids=lambda n: n.name)
def test_nothing_is_left_behind_by_a_run_with_ranks(number, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT / "scripts",
        env=clean_environment({"TMPDIR": str(tmp_path)}),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        # a run in the background of a shell inherits SIGINT ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    started = set()
    try:
        until(lambda: is_launched(process.pid), 60, "the ranks")
        (host,) = [name for name in namespaces(process.pid) if name.endswith("-h0")]
        before = sent_bytes(host)
        until(lambda: sent_bytes(host) > before + 3_000_000, 60, "their traffic")
        started = descendants(process.pid)
        assert len(started) >= 3  # the launcher and two ranks
        os.kill(process.pid, number)
        process.wait(20)
        if number == signal.SIGKILL:  # cannot be caught: the next run sweeps up
            until(lambda: sweep() is not None and not namespaces(process.pid), 10, "an end of the namespaces")
        else:
            assert list(tmp_path.glob("commhooks-*")) == []
        assert namespaces(process.pid) == []
        until(lambda: not alive(started), 10, "the end of launcher and ranks")
    finally:
        process.kill()
        process.wait()
        sweep()
        for pid in alive(started):
            os.kill(pid, signal.SIGKILL)
