"""The command line: ``commhooks info``, ``plan`` and ``bench``, also as ``python -m commhooks``."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from . import __version__
from .bench import command as bench_command
from .errors import CommHooksError
from .native import abi
from .planner import command
from .transports.launcher import launched

T = TypeVar("T")

DESCRIPTION = "Cheap gradient communication for data-parallel training: what is usable here, and what to use."
INFO = "Shows versions, devices, which kernels run, and what was found but cannot be used, with the reason."

_MPI = """
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
library = " ".join(MPI.Get_library_version().replace(chr(0), "").split())
print(f"mpi4py {mpi4py.__version__}, {library[:60]}")
"""
_HOROVOD = """
import horovod
import horovod.torch as hvd
over = [name for name in ("mpi", "gloo", "nccl") if getattr(hvd, name + "_built")()]
print(f"{horovod.__version__} over {', '.join(over)}")
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand and returns its exit status.

    It is 0, or 2 for arguments that cannot be served, or 1 when a rank is missing.
    """
    arguments = parser().parse_args(argv)
    status: int = arguments.run(arguments)
    return status


def parser() -> argparse.ArgumentParser:
    """Builds the argument parser.

    Each subcommand sets ``run``, a function of the parsed arguments that returns the exit status.
    """
    top = argparse.ArgumentParser(prog="commhooks", description=DESCRIPTION)
    top.add_argument("--version", action="version", version=f"commhooks {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    info = commands.add_parser("info", help=INFO, description=INFO)
    info.add_argument("--json", action="store_true", help="Print one JSON object instead of text.")
    info.set_defaults(run=_info)
    plan = commands.add_parser("plan", help=command.DESCRIPTION, description=command.DESCRIPTION)
    command.add_arguments(plan)
    plan.set_defaults(run=_plan)
    bench = commands.add_parser(
        "bench", help=bench_command.DESCRIPTION, description=bench_command.DESCRIPTION
    )
    bench_command.add_arguments(bench)
    bench.set_defaults(run=_bench)
    return top


def _info(arguments: argparse.Namespace) -> int:
    """Prints what is usable here. Under a launcher only rank 0 prints."""
    started = launched()
    if started is not None and started.rank > 0:
        return 0
    try:
        lines = describe()
    except ValueError as error:  # an environment variable has an unknown value
        print(f"commhooks info: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(lines, indent=1))
        return 0
    width = max(map(len, lines))
    for name, line in lines.items():
        print(f"{name:<{width}}  {line}")
    return 0


def describe() -> dict[str, str]:
    """Returns what ``info`` shows: one line of text per name, in the order of printing.

    Raises:
        ValueError: an environment variable of commhooks has a value that it does not know.
    """
    started = launched()
    ranks = "none" if started is None else f"{started.launcher}, {started.world_size} ranks"
    return {
        "commhooks": f"{__version__}, {Path(__file__).parent}",
        **abi.describe(),
        "gpu": _gpu(),
        "mpi": _found_by(_MPI, "mpi4py", "pip install mpi4py mpich"),
        "horovod": _found_by(_HOROVOD, "horovod", "scripts/install_horovod"),
        "launcher": ranks,
    }


def _gpu() -> str:
    """Names the GPUs that torch sees, or says why it sees none."""
    if torch.cuda.is_available():
        return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    if torch.version.cuda is None:
        return f"none: torch {torch.__version__} is built without CUDA"
    return f"none: torch is built for CUDA {torch.version.cuda} and finds no usable device or driver"


def _found_by(program: str, package: str, install: str) -> str:
    """Runs ``program`` in a child process and returns what it prints, or why it failed.

    It is a child process because importing ``package`` may crash.
    """
    command_line = [sys.executable, "-c", program]
    try:
        done = subprocess.run(command_line, capture_output=True, text=True, errors="replace", timeout=60)
    except subprocess.TimeoutExpired:
        return f"unusable: importing {package} takes more than 60 s"
    if done.returncode == 0:
        return done.stdout.strip()
    last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    if last == f"ModuleNotFoundError: No module named {package!r}":
        return f"not installed ({install})"
    return f"unusable: {last}"


def _run(
    name: str, run: Callable[[argparse.Namespace], T], arguments: argparse.Namespace
) -> tuple[T | None, int]:
    """Measures on all ranks. Returns what was found, and the exit status. An error is printed."""
    try:
        return run(arguments), 0
    except (ValueError, ImportError) as error:
        print(f"commhooks {name}: {error}", file=sys.stderr)
        return None, 2
    except CommHooksError as error:  # a rank is missing: there is nothing wrong with the arguments
        print(f"commhooks {name}: {error}", file=sys.stderr)
        return None, 1


def _plan(arguments: argparse.Namespace) -> int:
    """Prints the plan on rank 0."""
    found, status = _run("plan", command.run, arguments)
    if found is not None:
        print(json.dumps(command.as_dict(*found), indent=1) if arguments.json else command.text(*found))
    return status


def _bench(arguments: argparse.Namespace) -> int:
    """Prints and saves the report on rank 0."""
    report, status = _run("bench", bench_command.run, arguments)
    if report is not None:
        print(bench_command.text(report))
        bench_command.save(report, arguments.json, arguments.plot)
    return status
