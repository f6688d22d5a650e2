"""Prints what an environment has, as one JSON object: Python, its headers, torch, Horovod, MPICH and mpi4py.

Run by the interpreter of the environment (Python 3.8 and newer); it imports none of the packages.
"""

import json
import sys
import sysconfig
from importlib import metadata

found = {
    "prefix": sys.prefix,
    "include": sysconfig.get_paths()["include"],
    "version": list(sys.version_info[:2]),
    "tag": "cp%d%d" % sys.version_info[:2],
}
for name in ("torch", "horovod", "mpich", "mpi4py"):
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        found[name] = None
print(json.dumps(found))
