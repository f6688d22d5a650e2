"""Loads the installed Horovod and prints what it was built with and which MPI libraries the process has mapped.

Run by the interpreter of the environment; the last line is "CHECK " and a JSON object.
"""

import json
import re

import horovod
import horovod.torch as hvd  # before mpi4py, which would otherwise hide a second library of the same name

found = {"version": horovod.__version__, "mpi": bool(hvd.mpi_built()), "gloo": bool(hvd.gloo_built())}
try:
    from mpi4py import MPI

    found["mpi4py"] = MPI.Get_library_version().splitlines()[0].strip()
except Exception:
    found["mpi4py"] = None
try:
    with open("/proc/self/maps") as file:
        maps = file.read()
except OSError:
    maps = ""
found["libraries"] = sorted(set(re.findall(r"(/\S*/libmpi[^/ ]*\.so\S*)", maps)))
print("CHECK " + json.dumps(found))
