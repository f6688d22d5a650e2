"""The cores on which threads of ours run, also under ``OMP_PROC_BIND``.

With ``OMP_PROC_BIND=true`` the OpenMP library that torch brings pins the main thread to one core as soon as
torch is imported. Threads that are not OpenMP's inherit that core, and would run there in turns with the main
thread. The library still knows all cores of the process: they are its places.
"""

from __future__ import annotations

import ctypes
import functools
import os


def unpin() -> None:
    """Lets the calling thread, and threads that it starts, run on all cores of the process.

    Does nothing where no OpenMP library has pinned threads.
    """
    cores = _places()
    if cores:
        os.sched_setaffinity(0, cores)


def is_pinned() -> bool:
    """Whether the calling thread may run on fewer cores than the process."""
    return bool(_places() - os.sched_getaffinity(0)) if _places() else False


@functools.cache
def _places() -> frozenset[int]:
    """Reads the cores of the OpenMP library's places. Empty: it pins no threads or is not libgomp."""
    if not hasattr(os, "sched_setaffinity"):
        return frozenset()
    try:
        with open("/proc/self/maps") as maps:
            file = next((line.split()[-1] for line in maps if "libgomp" in line), None)
        library = ctypes.CDLL(file) if file else None
        if library is None or not library.omp_get_proc_bind():
            return frozenset()
        cores: set[int] = set()
        for place in range(library.omp_get_num_places()):
            ids = (ctypes.c_int * library.omp_get_place_num_procs(place))()
            library.omp_get_place_proc_ids(place, ids)
            cores.update(ids)
        return frozenset(cores)
    except (OSError, AttributeError):  # no /proc, or a library without places
        return frozenset()
