"""The exchange alone: ResNet-50's size at density 0.001 (25,558 pairs) through every aggregator."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import torch

from commhooks.gradient.sparse_grad import SparseGrad
from commhooks.transports import Transport, make
from commhooks.wire.message import Context

from ..harness.namespaces import NETWORKS
from ..harness.ranks import check_crossed, interface_bytes, largest, settle
from ..harness.records import Record
from ..harness.table import columns, number
from .schemes import MPI_SUFFIX, OURS, parts

NUMEL = 25_557_032
PAIRS = 25_558
_REPEATS = 20


def cases(pairs: Sequence[int] = (PAIRS,)) -> list[dict[str, Any]]:
    """Every aggregator over both transports, for each number of pairs."""
    return [
        {"scheme": name + suffix, "pairs": k} for k in pairs for suffix in ("", MPI_SUFFIX) for name in OURS
    ]


def measure(case: dict[str, Any], rank: int, size: int) -> Iterator[Record]:
    """Yields one record.

    Keys: `exchange_s` (median over `repeats` exchanges, each the slowest rank's), `counted_bytes` and
    `interface_bytes` (sent per exchange by the rank that sends most).
    """
    _, aggregator, _ = parts(case["scheme"], 0.001)
    transport = make(aggregator.requested, timeout_s=60.0)
    pairs = _pairs(case["pairs"], rank if "randomk" not in case["scheme"] else 0)

    def once(context: Context) -> None:
        aggregator.aggregate(transport, pairs, False, context)

    yield case | {"numel": NUMEL} | timed(transport, once, _REPEATS, case["scheme"])
    transport.close()


def timed(transport: Transport, once: Callable[[Context], None], repeats: int, what: str) -> Record:
    """Repeats an exchange, after two that do not count; returns the keys of `measure`. A collective call."""
    seconds, counted = [], transport.counters.bytes_sent
    interface = interface_bytes()
    for step in range(repeats + 2):
        settle()
        begun = time.perf_counter()
        once(Context(0, step))
        seconds.append(time.perf_counter() - begun)
    settle()
    slowest = largest(seconds[2:])
    sent = [transport.counters.bytes_sent - counted, interface_bytes() - interface]
    check_crossed(*sent, what)
    most = largest([bytes_sent / (repeats + 2) for bytes_sent in sent])
    return {
        "exchange_s": median(slowest),
        "repeats": repeats,
        "counted_bytes": most[0],
        "interface_bytes": most[1],
    }


def _pairs(k: int, seed: int) -> SparseGrad:
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(NUMEL, (2 * k + 64,), generator=generator).unique()
    places = places[torch.randperm(places.numel(), generator=generator)[:k]].sort().values
    return SparseGrad(torch.randn(k, generator=generator), places.to(torch.int32), NUMEL)


def over_bound(record: Record) -> float:
    """Time over its bound: the bytes that one rank sends at most, divided by the bandwidth."""
    return float(record["exchange_s"] / (record["counted_bytes"] * 8e-6 / NETWORKS[record["network"]]))


def table(records: Sequence[Record]) -> str:
    """A line for each scheme."""
    rows = []
    for r in records:
        labels = (r["scheme"], f"{r['pairs']:,}", str(r["ranks"]), r["network"])
        rows.append((*labels, number(r["exchange_s"] * 1e3), number(over_bound(r))))
    return "\n" + columns(("bare exchange", "pairs", "ranks", "network", "ms", "/bound"), rows)
