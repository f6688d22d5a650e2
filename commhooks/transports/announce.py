"""Tells decisions that a job's owner should see, once a job."""

from __future__ import annotations

import logging
import sys

import torch.distributed as dist

from .launcher import launched


def tell(logger: logging.Logger, line: str) -> None:
    """Tells one line: in the log where ``logger`` shows the level INFO, else on stderr."""
    if logger.isEnabledFor(logging.INFO):
        logger.info(line)
    else:
        sys.stderr.write(line + "\n")


def is_first_rank() -> bool:
    """Whether this process is rank 0: of the default process group, else by the launcher's variables."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    place = launched()
    return place is None or place.rank == 0
