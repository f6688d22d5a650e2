"""`scripts/bench lowbit`: every element in few bits, across a slow network.

Needs root. It times a bare exchange of ResNet-50's size in 1, 2, 4 and 8 bits beside its bytes over the
bandwidth, steps of ResNet-50's gradients in 4 bits beside dense and fp16, and steps of a GPT that trains.
Every number of bits must first conserve a small vector.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from commhooks import LowBit
from commhooks.transports import Transport, make
from commhooks.wire.low_bit import chunks
from commhooks.wire.message import Context

from ..harness import study
from ..harness.namespaces import NETWORKS
from ..harness.records import Record
from ..harness.table import columns, number
from . import step, training
from .exchange import NUMEL, over_bound, timed
from .schemes import LOW_BIT

BITS = (1, 2, 4, 8)
RANKS = 4
SCHEMES = ("none", "dense", "fp16", LOW_BIT)
_REPEATS = 7
_LEAST_BURST_BYTES = 10_000  # as for other bare exchanges at 100 Mbit/s
_SMALL = 10_000
_TOLERANCE = 1e-5


def measure(case: dict[str, Any], rank: int, size: int) -> Iterator[Record]:
    """Yields one record, with the keys of `exchange.measure`."""
    exchange, transport = LowBit(case["bits"]), make("distributed", timeout_s=60.0)
    check_conserves(exchange, transport)
    values, mean = torch.randn(NUMEL, generator=torch.Generator().manual_seed(rank)), torch.empty(NUMEL)
    owned = torch.zeros(_own(NUMEL, transport))

    def once(context: Context) -> None:
        nonlocal owned
        out = exchange.mean(transport, values, owned, False, context)
        out.decode(mean)
        owned = out.owned

    yield case | {"numel": NUMEL} | timed(transport, once, _REPEATS, f"{case['bits']} bits")
    transport.close()


def check_conserves(exchange: LowBit, transport: Transport) -> None:
    """Compares a mean and what both roundings kept with the mean of what was put in. A collective call.

    Raises:
        RuntimeError: they differ.
    """
    values = torch.randn(_SMALL, generator=torch.Generator().manual_seed(transport.rank))
    wanted = values.clone()
    found = exchange.mean(transport, values, torch.zeros(_own(_SMALL, transport)), False, Context(1, 0))
    begin, end = chunks(_SMALL, transport.world_size)[transport.rank]
    values[begin:end] += found.owned * transport.world_size
    for tensor in (wanted, values):
        dist.all_reduce(tensor)
    off = float((found.mean + (values - wanted) / transport.world_size).abs().max())
    if off > _TOLERANCE:
        raise RuntimeError(f"{exchange.bits} bits lose {off:g} of an element")


def _own(numel: int, transport: Transport) -> int:
    begin, end = chunks(numel, transport.world_size)[transport.rank]
    return end - begin


def table(records: Sequence[Record]) -> str:
    """Of the records of one job."""
    if records[0]["bench"] != "low_bit":
        return (training if records[0]["bench"] == "training" else step).table(records)
    rows = []
    for r in records:
        cells = (str(r["bits"]), r["network"], number(r["exchange_s"] * 1e3), number(over_bound(r)))
        rows.append((*cells, number(r["counted_bytes"] * 1e-6)))
    return "\n" + columns(("bits", "network", "ms", "/bound", "MB"), rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `scripts/bench lowbit`."""
    study.add_arguments(parser, draws=False)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["100mbit", "1gbit"])
    parser.add_argument("--training", nargs="*", choices=NETWORKS, default=["10mbit", "100mbit"])
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each scheme at 1 Gbit/s")


def run(options: argparse.Namespace) -> int:
    """Measures, prints and writes records."""
    return study.run(jobs(options), options, table)


def jobs(options: argparse.Namespace) -> list[study.Job]:
    """For each network the bare exchanges, and at 1 Gbit/s the steps, all of one start; then the training steps."""
    cases = [{"bits": bits} for bits in BITS]
    found = []
    for network in options.networks:
        burst_bytes = _LEAST_BURST_BYTES if network == "100mbit" else None
        found.append(study.Job("low_bit", RANKS, network, cases, 300.0, burst_bytes))
        if network == "1gbit":
            steps = [step.Case(name, "resnet50", 1.0, options.steps).as_json() for name in SCHEMES]
            found.append(study.Job("step", RANKS, network, steps, 500.0))
    trained = [{"method": method} for method in training.METHODS]
    return found + [study.Job("training", RANKS, network, trained, 500.0) for network in options.training]
