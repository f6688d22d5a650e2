"""`scripts/bench diloco`: DiLoCo of commhooks beside torchft's, the same model, batches, optimizers and period.

Needs root, and `pip install torchft`. First both train `gpt` in float64 and must end at the same parameters.
AdamW steps inside, SGD with Nesterov momentum outside, both with the
paper's settings. `gpt` trains on text that is on this machine and is evaluated at the end; `resnet50` is a
stand-in that has its shapes and computes nothing, for the time of a synchronisation alone. torchft's ranks
are replica groups of one; its lighthouse runs on rank 0. A synchronisation happens inside the inner
optimizer's `step()` in both libraries. Its time is that of such a step less the median of the other steps.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import os
import socket
import sys
import textwrap
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from importlib.util import find_spec
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from training.tasks import Share, make

from commhooks import LowBit
from commhooks.averaging import DiLoCo

from ..harness import study
from ..harness.launch import ADDRESS
from ..harness.namespaces import NETWORKS
from ..harness.ranks import interface_bytes, largest, settle
from ..harness.records import Record
from ..harness.table import columns, number
from .models import MODELS, StandIn

TORCHFT = "torchft"
WIRES: dict[str, Any] = {
    "commhooks": None,
    "commhooks, bfloat16": torch.bfloat16,
    "commhooks, 1 bit": LowBit(1),
}
OURS = "commhooks"
LIBRARIES = (TORCHFT, *WIRES)
BOTH = "both in float64"
MOST_DIFFERENCE = 1e-8
"""Between the parameters of both libraries in float64. Rounding is 1e-15 after 30 steps; in float32 runs may part."""
OUTER = {"lr": 0.7, "momentum": 0.9, "nesterov": True}
CASES: dict[str, dict[str, Any]] = {
    "gpt": {"sync_every": 10, "steps": 60, "lr": 1e-3},
    "resnet50": {"sync_every": 2, "steps": 10, "lr": 1e-3},
}
_TEXT = {
    "task": "text",
    "model": "gpt",
    "level": "char",
    "text_size": 100_000,
    "vocabulary": 2000,
    "window": 32,
}
_TEXT |= {"dropout": 0.0, "batch_size": 4}
_TIMEOUT = timedelta(seconds=120)


@contextmanager
def _commhooks(model: Any, inner: Any, outer: Any, sync_every: int, wire: Any) -> Iterator[Any]:
    averager = DiLoCo(model.parameters(), outer, sync_every=sync_every, inner_optimizer=inner, wire=wire)
    with averager:
        yield averager


@contextmanager
def _torchft(model: Any, inner: Any, outer: Any, sync_every: int, lighthouse: str) -> Iterator[None]:
    from torchft import Manager, ProcessGroupGloo
    from torchft.local_sgd import DiLoCo as DiLoCoOfTorchft

    host = _own_address()
    store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=_TIMEOUT),
        min_replica_size=dist.get_world_size(),
        use_async_quorum=False,
        load_state_dict=model.load_state_dict,
        state_dict=model.state_dict,
        replica_id=f"replica {dist.get_rank()}",
        rank=0,
        world_size=1,
        store_addr=host,
        store_port=store.port,
        lighthouse_addr=lighthouse,
        hostname=host,
        timeout=_TIMEOUT,
        quorum_timeout=_TIMEOUT,
        connect_timeout=_TIMEOUT,
        init_sync=False,
    )
    try:
        with DiLoCoOfTorchft(manager, [model], inner, outer, sync_every=sync_every):
            yield
    finally:
        manager.shutdown(wait=False)


def lines(library: str) -> int:
    """Statements that a user adds: those of the functions above, without imports, `yield` and clean-up.

    A call counts as one, however many arguments it has.
    """
    source = textwrap.dedent(inspect.getsource(_torchft if library == TORCHFT else _commhooks))
    body = ast.parse(source).body[0].body  # type: ignore[attr-defined]
    kept = (ast.Assign, ast.With)
    return sum(isinstance(node, kept) for statement in body for node in ast.walk(statement))


def measure(case: dict[str, Any], rank: int, size: int) -> Iterator[Record]:
    """Yields one record.

    Keys: `sync_s` (median over the synchronisations but the first, the slowest rank's), `sync_bytes` (sent by
    the rank that sends most, their median), `lines`, `loss` (of the common model after the last one; `gpt`).
    For `BOTH`: `difference` (the largest of any parameter).

    Raises:
        AssertionError: both libraries end at other parameters in float64.
    """
    if case["library"] == BOTH:
        theirs, ours = (
            _trained(case | {"library": name}, rank, size, torch.float64) for name in (TORCHFT, OURS)
        )
        pairs = zip(theirs.parameters, ours.parameters, strict=True)
        difference = largest([max(float((a - b).abs().max()) for a, b in pairs)])[0]
        assert difference < MOST_DIFFERENCE, f"torchft and commhooks differ by {difference:.1e}"
        yield case | {"difference": difference}
        return
    trained = _trained(case, rank, size)
    plain = median([seconds for is_sync, seconds, _ in trained.rows if not is_sync])
    synced = [(seconds - plain, sent) for is_sync, seconds, sent in trained.rows if is_sync][1:]
    yield case | {
        "numel": sum(p.numel() for p in trained.parameters),
        "sync_s": median(seconds for seconds, _ in synced),
        "sync_bytes": median(sent for _, sent in synced),
        "synchronisations": len(synced),
        "lines": lines(case["library"]),
        **trained.loss,
    }


class Trained(NamedTuple):
    """What a run leaves.

    Attributes:
        rows: of `_train`.
        loss: `loss`, if the model was evaluated.
        parameters: of the common model.
    """

    rows: list[tuple[bool, float, float]]
    loss: dict[str, float]
    parameters: list[Tensor]


def _trained(case: dict[str, Any], rank: int, size: int, dtype: torch.dtype = torch.float32) -> Trained:
    torch.manual_seed(0)
    model, loss_of, evaluate = _problem(case["model"], rank, size)
    model.to(dtype)
    inner = torch.optim.AdamW(model.parameters(), lr=case["lr"])
    outer = torch.optim.SGD(model.parameters(), **OUTER)
    library = case["library"]
    with _lighthouse(library, rank, size) as address:
        arguments = (model, inner, outer, case["sync_every"])
        made = _torchft(*arguments, address) if library == TORCHFT else _commhooks(*arguments, WIRES[library])
        with made as averager:
            rows = _train(case, inner, loss_of)
            with averager.common_model() if averager is not None else nullcontext():
                loss = {} if evaluate is None else _evaluated(evaluate)
                parameters = [parameter.detach().clone() for parameter in model.parameters()]
            settle()
    return Trained(rows, loss, parameters)


def _problem(name: str, rank: int, size: int) -> tuple[Any, Callable[[int], Any], Callable[[], Any] | None]:
    """The model, the loss of a step, and what evaluates the model (None: it is not trained)."""
    if name in MODELS:
        model = StandIn(MODELS[name](), seed=rank)
        start = torch.zeros((), requires_grad=True)
        return model, lambda step: model(start), None
    task = make(Namespace(**_TEXT), Share(rank, size, _TEXT["batch_size"], 0), torch.device("cpu"))
    return (
        task.model,
        lambda step: task.loss(task.model, *divmod(step, task.steps_per_epoch), None)[0],
        (lambda: task.evaluate(task.model.eval())),
    )


def _train(
    case: dict[str, Any], inner: Any, loss_of: Callable[[int], Any]
) -> list[tuple[bool, float, float]]:
    """For each step: whether it synchronises, seconds in `step()`, and bytes sent; the largest over ranks."""
    rows = []
    for step in range(case["steps"]):
        inner.zero_grad()
        loss_of(step).backward()
        settle()
        sent, begun = interface_bytes(), time.perf_counter()
        inner.step()
        seconds = time.perf_counter() - begun
        settle()
        slowest, most = largest([seconds, float(interface_bytes() - sent)])
        rows.append(((step + 1) % case["sync_every"] == 0, slowest, most))
    return rows


def _evaluated(evaluate: Callable[[], Any]) -> dict[str, float]:
    sums = evaluate()
    dist.all_reduce(sums)
    return {"loss": float(sums[0] / sums[2])}


@contextmanager
def _lighthouse(library: str, rank: int, size: int) -> Iterator[str]:
    """torchft's lighthouse on rank 0; its address on all ranks."""
    address, server = [""], None
    if library == TORCHFT and rank == 0:
        from torchft.coordination import LighthouseServer

        server = LighthouseServer(bind="0.0.0.0:0", min_replicas=size, join_timeout_ms=60_000)
        port = server.address().rsplit(":", 1)[1]
        address = [f"http://{os.environ[ADDRESS]}:{port}"]
    dist.broadcast_object_list(address)
    yield address[0]
    settle()
    if server is not None:
        server.shutdown()


def _own_address() -> str:
    """This rank's address on the network on which rank 0 is."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ[ADDRESS], 9))
        return str(probe.getsockname()[0])


def table(records: Sequence[Record]) -> str:
    """A line for each library, and what both in float64 differ by."""
    rows = []
    for r in records:
        if r["library"] == BOTH:
            continue
        loss = f"{r['loss']:.3f}" if "loss" in r else "-"
        cells = (number(r["sync_s"] * 1e3), number(r["sync_bytes"] * 1e-6), str(r["lines"]), loss)
        rows.append((r["library"], r["model"], str(r["sync_every"]), *cells))
    shown = "\n" + columns(("library", "model", "H", "ms/sync", "MB/sync", "lines", "loss"), rows)
    for r in records:
        if r["library"] == BOTH:
            shown += f"\n{r['model']} in float64: parameters differ by {r['difference']:.1e} after {r['steps']} steps"
    return shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `scripts/bench diloco`."""
    study.add_arguments(parser, draws=False)
    parser.add_argument("--network", default="1gbit", choices=NETWORKS)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--libraries", nargs="+", default=list(LIBRARIES), choices=LIBRARIES)
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=CASES)


def run(options: argparse.Namespace) -> int:
    """Runs every library on every model, and writes."""
    if TORCHFT in options.libraries and find_spec(TORCHFT) is None:
        print(
            "scripts/bench diloco: torchft is not installed: pip install torchft, or leave it out of --libraries",
            file=sys.stderr,
        )
        return 2
    jobs = []
    for model in options.models:
        cases = [{"library": library, "model": model, **CASES[model]} for library in options.libraries]
        if model == "gpt" and {TORCHFT, OURS} <= set(options.libraries):
            cases.insert(0, {"library": BOTH, "model": model, **CASES[model], "steps": 30})
        jobs.append(study.Job("diloco", options.ranks, options.network, cases, timeout_s=1200.0))
    return study.run(jobs, options, table)
