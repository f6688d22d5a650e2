"""`scripts/bench`: one command for each benchmark, and `render` for the pages."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

#: Name, module (which has `add_arguments` and `run`), and what it is for.
COMMANDS = {
    "kernels": ("benchmarks.kernels.command", "time of each kernel beside plain rivals"),
    "network": ("benchmarks.network.matrix", "training steps across a slow network"),
    "overlap": ("benchmarks.network.overlap", "how much of the exchange hides behind backward"),
    "auto": ("benchmarks.network.auto", "SparseState.auto beside plain DDP on a link without a limit"),
    "accuracy": ("benchmarks.network.accuracy", "loss against wall-clock across a slow network"),
    "lowbit": ("benchmarks.network.low_bit", "every element in few bits, across a slow network"),
    "diloco": ("benchmarks.network.diloco", "DiLoCo beside torchft's, across a slow network"),
    "fit": ("benchmarks.network.fit", "costs of the cost model from bare exchanges"),
    "plan-check": ("benchmarks.network.plan_check", "what the planner predicts beside what it takes"),
    "render": ("benchmarks.harness.pages", "tables of the documentation from the records"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status (2: this machine cannot, or may not, measure)."""
    from commhooks.native import speed  # importing stays quick

    given = list(sys.argv[1:] if arguments is None else arguments)
    top = argparse.ArgumentParser(prog="scripts/bench", description=__doc__.splitlines()[0])
    commands = top.add_subparsers(dest="command", required=True)
    for name, (module_name, text) in COMMANDS.items():
        parser = commands.add_parser(name, help=text, description=text)
        if given[:1] != [name]:  # only what is asked for is imported
            continue
        module = importlib.import_module(module_name)
        module.add_arguments(parser)
        parser.set_defaults(run=module.run)
        if name != "render":
            speed.add_option(parser)
    options = top.parse_args(given)
    on_cpu = getattr(options, "device", "cpu") == "cpu"  # on CUDA the measurement looks for its own library
    if options.command != "render" and on_cpu and not options.allow_reference:
        reason = speed.refusal()
        if reason is not None:
            print(f"scripts/bench {options.command}: {reason}", file=sys.stderr)
            return 2
    return int(options.run(options) or 0)
