"""Whether an MPI library can send from GPU memory."""

from __future__ import annotations

import ctypes
from typing import Any

from ..errors import environment_choice

VARIABLE = "COMMHOOKS_MPI_CUDA_AWARE"
"""``1`` or ``0`` overrides the library's own answer: some libraries are CUDA-aware and do not report it."""


def is_cuda_aware(mpi: Any) -> bool:
    """Whether the MPI library can send from GPU memory.

    The variable ``COMMHOOKS_MPI_CUDA_AWARE`` decides when it is set. Otherwise ``MPIX_Query_cuda_support`` of
    Open MPI, MPICH or MVAPICH does. A library without this function counts as not CUDA-aware.

    Args:
        mpi: the module ``mpi4py.MPI``, initialised.

    Raises:
        ValueError: the variable is neither 0 nor 1.
    """
    wanted = environment_choice(VARIABLE, ("0", "1"), "")
    return wanted == "1" if wanted else _library_says_so(mpi.__file__)


def _library_says_so(extension: str) -> bool:
    # mpi4py's extension module is linked to the MPI library in use, whose symbols need not be global.
    query = getattr(ctypes.CDLL(extension), "MPIX_Query_cuda_support", None)
    return query is not None and bool(query())
