"""Speed is measured with the native kernels, unless the caller asks for the torch operators."""

from __future__ import annotations

import argparse

from . import abi


def add_option(parser: argparse.ArgumentParser) -> None:
    """Adds ``--allow-reference`` to the options of a command that measures speed."""
    parser.add_argument(
        "--allow-reference",
        action="store_true",
        help="Measure the torch operators where there are no native kernels. Default: refuse.",
    )


def why_slow(device_type: str = "cpu") -> str | None:
    """Says that the kernels for ``"cpu"`` or ``"cuda"`` are missing, and why. None where they are in use."""
    reason = abi.why_not(device_type)
    if reason is None:
        return None
    return f"the native kernels are not in use ({reason}), and the torch operators in their place are slower"


def refusal(device_type: str = "cpu", slow_rank: int | None = None) -> str | None:
    """Returns the error of a command that measures speed. None where nothing is missing.

    Args:
        device_type: where gradients live.
        slow_rank: a rank that lacks the kernels. None: this one alone is asked.
    """
    here = why_slow(device_type)
    if here is None and slow_rank is not None:
        here = f"the native kernels are not in use on rank {slow_rank}, which is slower for it"
    if here is None:
        return None
    return (
        f"{here}. `commhooks info` says which are in use, and scripts/setup builds them in a checkout; "
        "--allow-reference measures the torch operators"
    )
