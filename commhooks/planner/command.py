"""The command ``commhooks plan``: its options, its run, and the plan as text or JSON."""

from __future__ import annotations

import argparse
import os
import socket
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist

from ..native import speed
from ..transports import NAMES, OVER_TORCH, Transport, make
from ..transports.launcher import launched, local_rank
from .cost_model import LOW_BIT
from .measured import measured_plan, sizes_of, slow_rank
from .plan import ADAPTIVE, AVERAGING_PERIOD, DENSITIES, MARGIN, SAFE, STEADY, Job, Plan, Prediction
from .probe import slowest

MAX_NUMEL = 10**13
DESCRIPTION = (
    "Measures the network between the ranks and the speed of this device, in a few seconds, and says which "
    "scheme, density and bucket size to use, or not to compress. Run it under the launcher of your "
    "training, with as many ranks."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``plan`` to ``parser``."""
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--numel", type=float, metavar="N", help="Number of parameters, such as 25.5e6.")
    size.add_argument(
        "--model",
        metavar="MODULE:CALL",
        help="A model: what CALL() of MODULE returns, such as mine:build for build() in mine.py.",
    )
    parser.add_argument(
        "--transport",
        choices=NAMES,
        help="How messages travel; gloo and nccl are distributed with that backend required. Default: "
        "distributed under torchrun, mpi under mpiexec.",
    )
    parser.add_argument(
        "--densities",
        type=float,
        nargs="+",
        default=list(DENSITIES),
        metavar="D",
        help=f"Shares of a gradient that may be sent. Default: {' '.join(map(str, DENSITIES))}.",
    )
    parser.add_argument(
        "--backward-ms",
        type=float,
        default=0.0,
        metavar="MS",
        help="Time of one backward, which hides communication: time loss.backward() inside no_sync(). "
        "Default: 0, unknown: nothing is hidden.",
    )
    parser.add_argument("--device", default="cpu", help="Where gradients live: cpu or cuda. Default: cpu.")
    optimizer = parser.add_mutually_exclusive_group()
    optimizer.add_argument(
        "--adaptive",
        action="store_true",
        help="The optimizer is AdamW, Muon or another one than SGD. Gradients in 8 or 4 bits are considered "
        "then, and not sparse ones.",
    )
    optimizer.add_argument(
        "--plain-sgd",
        action="store_true",
        help="The optimizer is SGD without momentum. Random-k is considered then; with momentum it diverges.",
    )
    speed.add_option(parser)
    parser.add_argument("--json", action="store_true", help="Print one JSON object instead of text.")


def run(arguments: argparse.Namespace) -> tuple[Plan, str, bool] | None:
    """Measures and decides. A collective call.

    Returns:
        The plan, the transport's name, and whether all ranks are on one host, on rank 0; None on the others.

    Raises:
        ValueError: an argument out of range, a name that does not exist, a single rank, or a rank without
            native kernels (unless ``--allow-reference``).
        ImportError: ``--transport mpi`` without mpi4py.
    """
    numel, largest = sizes_of(_model(arguments.model)) if arguments.model else (_numel(arguments.numel), 0)
    device = _device(arguments.device)
    job = Job(
        numel,
        largest,
        arguments.backward_ms * 1e-3,
        tuple(arguments.densities),
        schemes=ADAPTIVE if arguments.adaptive else (*SAFE, "randomk") if arguments.plain_sgd else SAFE,
    )
    with _transport(arguments.transport, device) as transport:
        if transport.world_size == 1:
            raise ValueError(_one_rank())
        slow = slow_rank(transport, device)
        if slow is not None and not arguments.allow_reference:
            raise ValueError(speed.refusal(device.type, slow))
        plan, rank, name = measured_plan(transport, job, device), transport.rank, transport.name
        host = float(zlib.crc32(socket.gethostname().encode()))
        largest_host, least_host = slowest(transport, [host, -host])
    return None if rank else (plan, name, largest_host == -least_host)


def text(plan: Plan, transport: str, one_host: bool = False) -> str:
    """Returns the plan as text for a terminal.

    Args:
        plan: what was decided.
        transport: the name of the measured transport.
        one_host: whether all ranks are on one host.
    """
    lines = [
        f"{plan.job.numel:,} parameters, {plan.world_size} ranks over {transport}",
        plan.table(),
        "",
        f"use {plan.summary()}: {plan.reason}",
    ]
    if plan.spread > STEADY:
        lines.append(
            f"the measurements differ by a factor of {plan.spread:.1f}: machine or network is busy with "
            "other work. Measure again when it is idle"
        )
    if plan.scheme != "dense":
        scheme, number = (plan.scheme, plan.density) if plan.bits is None else ("lowbit", plan.bits)
        lines.append(f"  model = DistributedDataParallel(model, bucket_cap_mb={plan.bucket_mb:g})")
        lines.append(f'  register(model, SparseState.{scheme}({number:g}, transport="{transport}"))')
    faster = plan.faster_if_allowed()
    if faster is not None:
        lines.append(_not_taken(plan, faster))
    elif (plan.scheme, plan.density) != (plan.predictions[0].scheme, plan.predictions[0].density):
        lines.append(f"a row that learns worse is taken only where it is {MARGIN:g} times faster")
    if one_host:
        lines.append("all ranks are on one host: this measured its memory, not a network")
    averaging = _averaging(plan)
    return "\n".join([*lines, averaging] if averaging else lines)


def _not_taken(plan: Plan, faster: Prediction) -> str:
    """Says which scheme would be faster, why it was not taken, and how it is allowed."""
    name = faster.scheme if faster.scheme in LOW_BIT else f"{faster.scheme} at density {faster.density:g}"
    if faster.scheme in LOW_BIT:
        why = "it is for other optimizers than SGD (--adaptive)"
    elif _is_adaptive(plan):
        why = "AdamW and Muon learn worse from sparse gradients (without --adaptive)"
    elif faster.scheme == "randomk":
        why = "it diverges with momentum (--plain-sgd)"
    else:
        why = f"it learns worse without a density warm-up (--densities {faster.density:g})"
    return f"{name} would be faster, and is not taken unasked: {why}"


def _is_adaptive(plan: Plan) -> bool:
    return set(plan.job.schemes) == set(ADAPTIVE)


def _averaging(plan: Plan) -> str | None:
    """The advice to average the model in one bit, where low bit pays and this takes at most half its time."""
    taken = next(p for p in plan.predictions if (p.scheme, p.density) == (plan.scheme, plan.density))
    if not _is_adaptive(plan) or plan.bits is None or 2 * plan.averaging_s > taken.step_s:
        return None
    return (
        f"averaging in one bit every {AVERAGING_PERIOD} steps would add {plan.averaging_s * 1e3:.3g} ms to a "
        f"step: DiLoCo(..., sync_every={AVERAGING_PERIOD}, wire=LowBit(1)), best with Muon inside; it is "
        "another way to train (docs/guide.md)"
    )


def as_dict(plan: Plan, transport: str, one_host: bool = False) -> dict[str, Any]:
    """Returns the plan as values that JSON can hold. Times are in seconds."""
    return {
        "scheme": plan.scheme,
        "density": plan.density,
        "bucket_cap_mb": plan.bucket_mb,
        "reason": plan.reason,
        "spread": plan.spread,
        "numel": plan.job.numel,
        "world_size": plan.world_size,
        "transport": transport,
        "one_host": one_host,
        "predictions": [asdict(p) for p in plan.predictions],
        "costs": asdict(plan.costs),
    }


def _one_rank() -> str:
    """Returns the error for a single rank: it shows how to start several, with this call's options."""
    options = " ".join(
        sys.argv[sys.argv.index("plan") + 1 :] if "plan" in sys.argv else ["--numel", "25.5e6"]
    )
    return (
        "one rank sends nothing, so there is nothing to plan. Start as many ranks as the training has:\n"
        f"  torchrun --nproc-per-node 4 -m commhooks plan {options}\n"
        f"  mpiexec -n 4 python -m mpi4py -m commhooks plan {options}"
    )


def _numel(number: float) -> int:
    if not 1 <= number <= MAX_NUMEL:  # NaN fails this too
        raise ValueError(f"--numel must be from 1 to {MAX_NUMEL:g}, got {number:g}")
    return round(number)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices here")
    if device.type == "cuda":
        if device.index is None:  # a GPU for each rank of a machine, as in the training
            device = torch.device("cuda", local_rank() % torch.cuda.device_count())
        torch.cuda.set_device(device)
    return device


def _model(name: str) -> torch.nn.Module:
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError(f"--model must look like MODULE:CALL, got {name!r}")
    try:
        made = getattr(import_module(module), attribute)()
    except Exception as error:  # the user's own code may raise anything
        reason = str(error).splitlines() or [""]
        raise ValueError(f"--model {name} failed: {type(error).__name__}: {reason[0]}") from error
    if not isinstance(made, torch.nn.Module):
        raise ValueError(f"--model {name} gave {type(made).__name__}, expected a torch Module")
    return made


@contextmanager
def _transport(name: str | None, device: torch.device) -> Iterator[Transport]:
    """Opens a transport over the ranks that a launcher started, and closes it afterwards.

    Raises:
        ValueError: no launcher started this process.
    """
    if launched() is None and name != "mpi":
        raise ValueError(_one_rank())
    if name is None:
        name = "distributed" if "WORLD_SIZE" in os.environ else "mpi"
    started: Any = name in OVER_TORCH and not dist.is_initialized()
    if started:
        dist.init_process_group("nccl" if device.type == "cuda" and name != "gloo" else "gloo")
    transport = make(name, device_type=device.type)
    try:
        yield transport
    finally:
        transport.close()
        if started:
            dist.destroy_process_group()
