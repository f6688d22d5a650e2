"""``python -m commhooks plan``: the plan as text."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist

from ..transports import Transport, in_process, make
from .auto import sizes_of
from .cost_model import Costs
from .plan import DENSITIES, Plan, check_request, choose
from .probe import probe, slowest

MAX_NUMEL = 10**13
_MPI_RANKS = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``plan``."""
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--numel", type=float, metavar="N", help="number of parameters, such as 25.5e6")
    size.add_argument(
        "--model", metavar="MODULE:CALL", help="such as torchvision.models:resnet50; called without arguments"
    )
    parser.add_argument("--transport", choices=("distributed", "mpi"), help="default: what started the ranks")
    parser.add_argument("--densities", type=float, nargs="+", default=list(DENSITIES), metavar="D")
    parser.add_argument(
        "--backward-ms", type=float, default=0.0, help="one backward, which hides communication"
    )
    parser.add_argument("--device", default="cpu", help="where gradients live: cpu or cuda")


def run(arguments: argparse.Namespace) -> str:
    """Probes and decides; the text to print, empty on all ranks but the first.

    Raises:
        ValueError: an argument out of range, or one that names nothing.
        ImportError: ``--transport mpi`` without mpi4py.
    """
    numel, largest = sizes_of(_model(arguments.model)) if arguments.model else (_numel(arguments.numel), 0)
    device = _device(arguments.device)
    check_request(numel, arguments.densities, arguments.backward_ms)
    with _transport(arguments.transport, device) as transport:
        costs = probe(transport, numel, device)
        backward_s = slowest(transport, [arguments.backward_ms * 1e-3])[0]
        rank, world_size, name = transport.rank, transport.world_size, transport.name
    plan = choose(
        costs,
        numel,
        world_size,
        backward_s=backward_s,
        densities=arguments.densities,
        largest_numel=largest,
    )
    return "" if rank else text(plan, numel, name)


def text(plan: Plan, numel: int, transport: str) -> str:
    """The plan for a terminal, probed over the transport of that name."""
    over = f" over {transport}" if plan.world_size > 1 else ""
    lines = [
        f"{numel:,} parameters, {plan.world_size} ranks{over}",
        _costs_text(plan.costs),
        "",
        f"{'scheme':<10}{'density':>9}{'bucket MB':>11}{'added to a step':>17}",
    ]
    lines += [
        f"{p.scheme:<10}{p.density:>9g}{p.bucket_mb:>11g}{p.step_s * 1e3:>14.3g} ms" for p in plan.predictions
    ]
    return "\n".join([*lines, "", f"use {plan.summary()}: {plan.reason}", *_example(plan, transport)])


def _costs_text(costs: Costs) -> str:
    bandwidth = f"{8e-6 / costs.byte_s:,.0f} Mbit/s" if costs.byte_s else "no limit seen"
    return (
        f"message {costs.message_s * 1e6:.0f} us, bandwidth {bandwidth}, selection {costs.select_s * 1e9:.2f} ns "
        f"and write-back {costs.write_s * 1e9:.2f} ns per element, merge {costs.merge_s * 1e9:.1f} ns per pair"
    )


def _example(plan: Plan, transport: str) -> list[str]:
    if plan.scheme == "dense":
        return []
    call = f'SparseState.{plan.scheme}({plan.density:g}, transport="{transport}")'
    return [
        f"  model = DistributedDataParallel(model, bucket_cap_mb={plan.bucket_mb:g})",
        f"  register(model, {call})",
    ]


def _numel(number: float) -> int:
    if not 1 <= number <= MAX_NUMEL:  # NaN is not either
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
    return device


def _model(name: str) -> torch.nn.Module:
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError(f"--model must look like MODULE:CALL, got {name!r}")
    try:
        made = getattr(import_module(module), attribute)()
    except Exception as error:  # what the user's own code raises
        reason = str(error).splitlines() or [""]
        raise ValueError(f"--model {name} failed: {type(error).__name__}: {reason[0]}") from error
    if not isinstance(made, torch.nn.Module):
        raise ValueError(f"--model {name} gave {type(made).__name__}, expected a torch Module")
    return made


@contextmanager
def _transport(name: str | None, device: torch.device) -> Iterator[Transport]:
    """A transport over the ranks that mpiexec or torchrun started; one rank where neither did."""
    if name is None:
        mpi = any(variable in os.environ for variable in _MPI_RANKS)
        name = "distributed" if "WORLD_SIZE" in os.environ else "mpi" if mpi else None
    if name is None:
        yield in_process.group(1)[0]
        return
    started: Any = name == "distributed" and not dist.is_initialized()
    if started:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    transport = make(name, device_type=device.type)
    try:
        yield transport
    finally:
        transport.close()
        if started:
            dist.destroy_process_group()
