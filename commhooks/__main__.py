"""The program ``commhooks``, also as ``python -m commhooks``."""

import os
import sys
from typing import NoReturn

from .cli import main
from .transports.own_group import leave


def program() -> NoReturn:
    """Runs the command line and ends the process with its exit status, after a success by :func:`leave`."""
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, as in ``commhooks info | head -1``, has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    if status:
        sys.exit(status)  # mpi4py's runner then ends all ranks
    leave()


if __name__ == "__main__":
    program()
