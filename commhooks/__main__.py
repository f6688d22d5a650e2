"""The program ``commhooks``, also as ``python -m commhooks``."""

import logging
import os
import sys
from typing import NoReturn

from .cli import main


def program() -> NoReturn:
    """Runs the command line and ends the process with its exit status.

    After a success the process does not end by Python's own shutdown. Torch keeps the gloo threads of a
    process group that a DDP model has used, also after ``destroy_process_group``. Such a thread may still
    release a collective's tensors, for which it needs the interpreter. Python's shutdown kills it there, and
    the process aborts ("terminate called without an active exception").
    """
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, as in ``commhooks info | head -1``, has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    if status:
        sys.exit(status)  # mpi4py's runner then ends all ranks
    logging.shutdown()
    sys.stderr.flush()
    if "mpi4py.MPI" in sys.modules:
        from mpi4py import MPI

        if MPI.Is_initialized() and not MPI.Is_finalized():
            MPI.Finalize()
    os._exit(0)


if __name__ == "__main__":
    program()
