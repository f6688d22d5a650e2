"""The program of a rank: `python -m mpi4py -m benchmarks.harness.rank MEASUREMENT JOB.json OUT.jsonl`.

JOB is a list of cases. Every rank calls `benchmarks.network.MEASUREMENT.measure(case, rank, size)` for each
and takes all that it yields; rank 0 appends each record to OUT at once, so that a job which fails later has
not been for nothing.
"""

from __future__ import annotations

import gc
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist
from training.launch import leave

from .ranks import join


def main(arguments: Sequence[str]) -> None:
    """Runs all cases of a job on this rank."""
    name, job, out = arguments
    measurement = importlib.import_module(f"benchmarks.network.{name}")
    rank, size = join()
    for case in json.loads(Path(job).read_text()):
        for record in measurement.measure(case, rank, size):
            if rank == 0:
                with Path(out).open("a") as file:
                    file.write(json.dumps(record) + "\n")
        gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
    leave()
