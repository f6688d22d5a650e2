"""The test network itself: limits hold, traffic crosses, nothing is left behind. Needs root, `ip` and `tc`."""

import os
import signal
import subprocess
import sys
import time

import pytest
from benchmarks.command import main
from benchmarks.harness.namespaces import PREFIX, Network, NetworkUnavailable, sweep, why_not
from launch import ROOT


def listed(pid):
    """Our namespaces that belong to the process `pid`."""
    names = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.split()
    return [name for name in names if name.startswith(f"{PREFIX}-{pid}-")]


@pytest.mark.network
@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM, signal.SIGKILL), ids=lambda n: n.name)
def test_nothing_is_left_behind_by_an_interrupted_run(number):
    program = (
        "import subprocess, time\nfrom benchmarks.harness.namespaces import Network\n"
        "with Network(2, 100) as network:\n"
        "    subprocess.Popen(network.command(0, ['sleep', '60']))\n"
        "    print('ready', flush=True)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT / "scripts",
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        # a run in the background of a shell inherits SIGINT ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout.readline() == "ready\n"
        assert len(listed(process.pid)) == 3
        process.send_signal(number)
        process.wait(15)
        if number == signal.SIGKILL:  # cannot be caught: the next run sweeps up
            deadline = time.monotonic() + 5
            while listed(process.pid) and time.monotonic() < deadline:
                sweep()
        assert listed(process.pid) == []
    finally:
        process.kill()
        process.wait()
        sweep()


@pytest.mark.parametrize(
    "arguments", ({"hosts": 1}, {"hosts": 2, "rate_mbit": 0}, {"hosts": 2, "burst_bytes": 100})
)
def test_bad_arguments(arguments):
    with pytest.raises(ValueError):
        Network(**({"rate_mbit": 100} | arguments))


def test_refuses_politely(monkeypatch, capsys):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "need root" in why_not() or "missing" in why_not() or "Linux" in why_not()
    with pytest.raises(NetworkUnavailable):
        Network(2, 100).__enter__()
    assert main(["network", "--quick", "--allow-reference"]) == 2
    assert "scripts/bench network:" in capsys.readouterr().err
