"""How processes end, and what is left of transports that nobody closed."""

import json
import sys
from pathlib import Path

import pytest
from launch import run

JOB = Path(__file__).parent / "exit_job.py"
GLOO_THREADS = 2  # of one process group


@pytest.mark.parametrize("kind", ["state_without_close", "averager_without_close", "forked_child"])
def test_a_job_that_closes_nothing_ends_well(kind, repeats):
    """A thread of gloo holds a result of ours while Python shuts down: that aborted the process."""
    done = run([sys.executable, str(JOB), kind, str(repeats)], timeout=60.0 + 20.0 * repeats)
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    assert outcomes == [[[0, 0], [GLOO_THREADS, GLOO_THREADS]]] * repeats, done.show()


def test_the_command_line_ends_well(repeats):
    """A thread of gloo holds a result of the command's own group, and the process does not abort."""
    done = run([sys.executable, str(JOB), "command_line", str(repeats)], timeout=60.0 + 20.0 * repeats)
    statuses = [json.loads(line)[0] for line in done.stdout.splitlines()]
    assert statuses == [[0, 0]] * repeats, done.show()
