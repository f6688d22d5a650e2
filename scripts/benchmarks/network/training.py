"""Steps of a GPT of 1M parameters that really trains, across a limited link: the methods of the study of slow links.

Which loss a method has reached by which step is in the study's records (`scripts/accuracy --slow-links`); a
link changes the time of a step and not its result. torch's hooks, fp16 and PowerSGD, train under AdamW.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from studies import slow_links
from torch.nn.parallel import DistributedDataParallel
from training import launch, loop, options

from ..harness.ranks import interface_bytes, largest, settle
from ..harness.records import Record
from ..harness.table import columns, number
from .schemes import attach_peer

DENSE = "dense adamw"


class Timed(NamedTuple):
    """How many steps of a method are timed.

    Attributes:
        text: what tables call it.
        block: steps between two exchanges; whole blocks are timed.
        hook: of torch, on dense training; "": none.
    """

    text: str
    block: int = 1
    hook: str = ""


METHODS = {
    DENSE: Timed("dense AdamW"),
    "fp16": Timed("AdamW, torch's fp16 hook", hook="fp16"),
    "powersgd2": Timed("AdamW, torch's PowerSGD, rank 2", hook="powersgd2"),
    "lowbit4 adamw": Timed(slow_links.METHODS["lowbit4 adamw"].text),
    "muon k4": Timed(slow_links.METHODS["muon k4"].text, 4),
    "muon k14": Timed(slow_links.METHODS["muon k14"].text, 14),
}
_WARMUP = 6  # DDP lays its buckets anew after the first step, and PowerSGD begins to compress at the third
_STEPS = 8
_RATE = 0.003


def measure(case: dict[str, Any], rank: int, size: int) -> Iterator[Record]:
    """Yields one record. `case` has a `method`, a name in METHODS, and how many `steps` are timed (8 or two blocks).

    Keys: `step_s` (mean over the timed steps, the slowest rank's), `steps`, and `interface_bytes` (sent per
    step by the rank that sends most).
    """
    method = METHODS[case["method"]]
    first = method.block * -(-_WARMUP // method.block)
    steps = max(2 * method.block, case.get("steps", _STEPS))
    given = options.parse(slow_links.command(DENSE if method.hook else case["method"], _RATE, 0))
    given.stop_after = first + steps
    run = loop.Run(given, launch.World(rank, size, "mpi", torch.device("cpu")))
    if method.hook:
        _attach(run, method.hook)
    marks: list[tuple[float, int]] = []

    def after_step(done: int) -> None:
        if done in (first, first + steps):
            settle()
            marks.append((time.perf_counter(), interface_bytes()))

    run.train(after_step)
    (began_s, before), (ended_s, behind) = marks
    step_s, sent = largest([(ended_s - began_s) / steps, (behind - before) / steps])
    yield {"method": case["method"], "step_s": step_s, "steps": steps, "interface_bytes": sent}


def _attach(run: loop.Run, hook: str) -> None:
    """Wraps the run's model anew: PowerSGD wants one bucket, and a hook is registered once."""
    layout: dict[str, Any] = {"bucket_cap_mb": 4096} if hook.startswith("powersgd") else {}
    del run.strategy.model  # with it go the hooks on the parameters
    model = DistributedDataParallel(run.task.model, gradient_as_bucket_view=True, init_sync=False, **layout)
    attach_peer(hook, model)
    run.strategy.model = model


def table(records: Sequence[Record]) -> str:
    """Of the records of one job, the first of which is dense."""
    rows = []
    for r in records:
        cells = (
            METHODS[r["method"]].text,
            number(r["step_s"] * 1e3),
            number(records[0]["step_s"] / r["step_s"]),
        )
        rows.append((*cells, number(r["interface_bytes"] * 1e-6)))
    return "\n" + columns((f"GPT, {records[0]['network']}", "ms", "dense /", "MB"), rows)
