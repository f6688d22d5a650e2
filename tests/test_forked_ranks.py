"""The launcher of the tests' own ranks."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

GARBAGE = """
import gc, os, tempfile
import torch.distributed as dist
from launch import spawn_gloo

gc.disable()
os.environ["GLOO_SOCKET_IFNAME"] = "lo"


class Cycle:
    pass


with tempfile.TemporaryDirectory() as folder:
    dist.init_process_group("gloo", store=dist.FileStore(folder + "/store", 1), rank=0, world_size=1)
    cycle = Cycle()
    cycle.itself, cycle.group = cycle, dist.distributed_c10d._get_default_group()
    dist.destroy_process_group()
    del cycle
    print(spawn_gloo(lambda rank, size: gc.collect() >= 0, 2, timeout=20.0))
"""


def test_a_forked_rank_leaves_the_parents_garbage_alone() -> None:
    """The destructor of a process group joins threads; a forked process has none of them and would wait for ever."""
    done = subprocess.run(
        [sys.executable, "-c", GARBAGE], cwd=ROOT / "tests", capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "[True, True]", done.stdout + done.stderr
