"""Measures PowerSGD in a process of its own, which its parent ends at a deadline: the hook may hang.

python -m commhooks.bench.child '{"rank": 0, ...}'
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .measure import attach, timed
from .models import Source, make_workload

START_S = 60.0
"""Seconds that a child may take for its start, beside twice the seconds that it may measure."""


@dataclass
class Task:
    """What a child measures, and where it meets the others."""

    rank: int
    size: int
    host: str
    port: int
    seconds: float
    source: Source


def meeting_place() -> tuple[str, int]:
    """Returns an address on rank 0's host where the children can meet. A collective call."""
    hosts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    place: list[tuple[str, int] | None] = [None]
    if dist.get_rank() == 0:
        named = os.environ.get("MASTER_ADDR") or hosts[0]
        with socket.socket() as listener:
            listener.bind(("", 0))
            place = [("127.0.0.1" if len(set(hosts)) == 1 else named, int(listener.getsockname()[1]))]
    dist.broadcast_object_list(place, src=0)
    assert place[0] is not None
    return place[0]


def measure(task: Task, deadline_s: float) -> tuple[float, int] | None:
    """Runs the child; returns seconds a step and number of steps, or None at the deadline or a failure."""
    command = [sys.executable, "-m", "commhooks.bench.child", json.dumps(asdict(task))]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        output, _ = child.communicate(timeout=deadline_s)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
        return None
    if not output:  # it failed. A failure while it ends, with the figures out, does not matter
        return None
    seconds, steps = json.loads(output.splitlines()[-1])
    return float(seconds), int(steps)


def main(text: str) -> None:
    """Measures the task that ``text`` describes, and writes seconds and steps to stdout."""
    task = Task(**json.loads(text))
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS") or 1)))
    store: Any = dist.TCPStore(  # type: ignore[attr-defined]
        task.host, task.port, task.size, is_master=task.rank == 0, timeout=timedelta(seconds=START_S)
    )
    dist.init_process_group("gloo", store=store, rank=task.rank, world_size=task.size)
    workload = make_workload(Source(*task.source), task.rank)
    ddp, _ = attach("powersgd", workload, 1.0)
    for _ in range(3):  # it compresses from the third step on
        workload.loss(ddp).backward()  # type: ignore[no-untyped-call]
    sys.stdout.write(json.dumps(timed(ddp, workload, task.seconds)) + "\n")
    sys.stdout.flush()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
