"""``python -m commhooks``: small things to run from a shell."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import __version__
from .native import abi
from .planner import command


def _info(arguments: argparse.Namespace) -> int:
    """Prints which implementation of the kernels is in use, and where."""
    lines = {"commhooks": __version__, **abi.describe()}
    width = max(map(len, lines))
    for name, text in lines.items():
        print(f"{name:<{width}}  {text}")
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    """Prints the plan on the first rank."""
    try:
        text = command.run(arguments)
    except (ValueError, ImportError) as error:
        print(f"python -m commhooks plan: {error}", file=sys.stderr)
        return 2
    if text:
        print(text)
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line; each subcommand sets ``run``, a function of the parsed arguments that returns an exit status."""
    top = argparse.ArgumentParser(prog="python -m commhooks", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="which kernels are in use, versions and devices")
    info.set_defaults(run=_info)
    plan = commands.add_parser(
        "plan", help="which scheme, density and bucket size to use here; run it under mpiexec or torchrun"
    )
    command.add_arguments(plan)
    plan.set_defaults(run=_plan)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand and returns its exit status."""
    arguments = parser().parse_args(argv)
    status: int = arguments.run(arguments)
    return status
