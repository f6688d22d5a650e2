"""The command ``commhooks bench``: its options, its run, and the figures as text, JSON or a picture."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..native import speed
from ..transports.launcher import launched
from .child import START_S, Task, meeting_place
from .child import measure as measure_in_child
from .figure import COLORS, WIDTH, color, figure
from .measure import FOREIGN, OURS, Row, attach, bytes_sent, check, check_repeats, timed
from .models import MODELS, Source, make_workload

DEFAULT = ("dense", "fp16", "powersgd", "topk", "gtopk", "lowbit")
DESCRIPTION = (
    "Measures schemes on your own network, in a minute: plain DDP, torch's fp16 and PowerSGD hooks, and "
    "ours. "
    "Run it under the launcher of your training, with as many ranks. Gradients are on the CPU."
)


@dataclass
class Report:
    """The figures of one run.

    Attributes:
        model: what was measured.
        numel: its parameters.
        world_size: number of ranks.
        hosts: names of the ranks' hosts.
        density: share of a gradient that ours sends.
        alone_s: seconds of a step without communication: the faster of two measurements, before and after
            the schemes.
        rows: one a scheme.
        slow_rank: a rank without native kernels. None: all have them.
    """

    model: str
    numel: int
    world_size: int
    hosts: list[str]
    density: float
    alone_s: float
    rows: list[Row]
    slow_rank: int | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``bench`` to ``parser``."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--model", choices=MODELS, default="resnet50", help="The built-in model to train. Default: resnet50."
    )
    what.add_argument(
        "--numel", type=float, metavar="N", help="Train a stack of square layers with about N parameters."
    )
    what.add_argument(
        "--module",
        metavar="PACKAGE:FUNCTION",
        help="Train a model of your own. FUNCTION of PACKAGE draws the batch and returns the model and a "
        "function of the model that returns a loss.",
    )
    parser.add_argument(
        "--schemes",
        nargs="+",
        choices=(*FOREIGN, *OURS),
        default=list(DEFAULT),
        metavar="S",
        help=f"The schemes to measure, of {', '.join((*FOREIGN, *OURS))}. Default: {' '.join(DEFAULT)}.",
    )
    parser.add_argument(
        "--density",
        type=float,
        default=0.01,
        metavar="D",
        help="The share of a gradient that our sparse schemes send. Default: 0.01.",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=60.0,
        metavar="S",
        help="Seconds that all measurements may take together. Default: 60.",
    )
    speed.add_option(parser)
    parser.add_argument(
        "--json", metavar="FILE", help="Write the figures to FILE, times in seconds. Default: no file."
    )
    parser.add_argument(
        "--plot", metavar="FILE", help="Draw the figures into FILE, with matplotlib. Default: no picture."
    )


def run(arguments: argparse.Namespace) -> Report | None:
    """Measures all schemes. A collective call.

    Returns:
        The report on rank 0; None on the others.

    Raises:
        ValueError: an argument out of range, a single rank, a rank without native kernels (unless
            ``--allow-reference``), a loss that gives another gradient each time, or a file that rank 0 could
            not write.
    """
    if not 0 < arguments.density <= 1:
        raise ValueError(f"--density must be in (0, 1], got {arguments.density:g}")
    if not arguments.seconds > 0:
        raise ValueError(f"--seconds must be positive, got {arguments.seconds:g}")
    if arguments.numel is not None and not 1 <= arguments.numel <= 1e10:
        raise ValueError(f"--numel must be from 1 to 1e10, got {arguments.numel:g}")
    with _group():
        rank, size = dist.get_rank(), dist.get_world_size()
        if size == 1:
            raise ValueError(_one_rank())
        slow = _slow_rank()
        if slow is not None and not arguments.allow_reference:
            raise ValueError(speed.refusal("cpu", slow))
        _check_files(arguments.json, arguments.plot)
        numel = None if arguments.numel is None else round(arguments.numel)
        model = None if arguments.module or numel else arguments.model
        source = Source(model, numel, arguments.module)
        begun, budget = time.monotonic(), arguments.seconds / (len(arguments.schemes) + 1)
        workload = make_workload(source, rank)
        dense, _ = attach("dense", workload, 1.0)
        check_repeats(dense, workload)
        before_s, _ = timed(dense, workload, budget / 2, synchronise=False)
        rows = {}
        for scheme in sorted(arguments.schemes, key="powersgd".__eq__):  # it starts a process: last
            late = _over(begun, arguments.seconds)
            note = Row(scheme, note=f"not run: --seconds {arguments.seconds:g} were over, give more")
            rows[scheme] = note if late else _row(scheme, source, arguments.density, budget)
        after_s, _ = timed(dense, workload, budget / 4, synchronise=False)
        alone_s = min(before_s, after_s)
        hosts: list[Any] = [None] * size
        dist.all_gather_object(hosts, socket.gethostname())
        ordered = [rows[scheme].beside(alone_s) for scheme in arguments.schemes]
        count = sum(p.numel() for p in workload.model.parameters() if p.requires_grad)
        names, density = sorted(set(hosts)), arguments.density
        report = Report(workload.name, count, size, names, density, alone_s, ordered, slow)
    return report if rank == 0 else None


def text(report: Report) -> str:
    """Returns the report as text for a terminal."""
    ours, one_host = f"density {report.density:g} (lowbit: 4 bits)", len(report.hosts) == 1
    lines = [
        f"{report.model}: {report.numel:,} parameters, {report.world_size} ranks on {len(report.hosts)} "
        f"host{'' if one_host else 's'}, {ours}",
        f"forward and backward alone: {1000 * report.alone_s:.1f} ms",
        "",
        f"{'scheme':<12}{'step':>10}{'exposed':>10}{'sent':>14}{'to dense':>10}{'steps':>7}",
        f"{'':<12}{'ms':>10}{'ms':>10}{'bytes':>14}{'':>10}",
    ]
    dense = next((r.step_s for r in report.rows if r.scheme == "dense"), None)
    for row in report.rows:
        if row.step_s is None or row.exposed_s is None:
            lines.append(f"{row.scheme:<12}  {row.note}")
            continue
        sent = "-" if row.bytes_sent is None else f"{row.bytes_sent:,}"
        faster = f"{row.step_s / dense:.2f}" if dense else "-"
        figures = (
            f"{1000 * row.step_s:>10.1f}{1000 * row.exposed_s:>10.1f}{sent:>14}{faster:>10}{row.steps:>7}"
        )
        lines.append(f"{row.scheme:<12}{figures}")
    lines += [
        "",
        "step: forward and backward, the slowest rank's time, median over the steps",
        "exposed: step - step inside no_sync, which is what communication adds",
        "sent: by a rank in a step; counted for ours, 2 (P - 1) / P * size for dense and fp16",
        "to dense: step / step of dense; below 1 is faster",
        "All averages but PowerSGD's were compared with the mean gradient first. PowerSGD is measured last.",
    ]
    if any((row.exposed_s or 0.0) < 0.0 for row in report.rows):
        lines.append(
            "A step without communication took longer than one with it: the machine is busy. Measure again."
        )
    if report.slow_rank is not None:
        lines.append(f"Rank {report.slow_rank} has no native kernels: ours ran on torch operators there.")
    if one_host:
        lines.append("All ranks are on one host: this measures its memory, not a network.")
    return "\n".join(lines)


def as_dict(report: Report) -> dict[str, Any]:
    """Returns the report as values that JSON can hold. Times are in seconds."""
    return asdict(report)


def save(report: Report, json_file: str | None, plot_file: str | None) -> None:
    """Writes the files that were asked for."""
    if json_file:
        Path(json_file).write_text(json.dumps(as_dict(report), indent=1) + "\n")
    if plot_file:
        _plot(report, Path(plot_file))


def _slow_rank() -> int | None:
    """Returns a rank without native kernels. None: all have them. A collective call."""
    lacks = speed.why_slow("cpu") is not None
    found = torch.tensor([dist.get_rank() + 1 if lacks else 0], dtype=torch.int64, device="cpu")
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found.item()) - 1 if found.item() else None


def _check_files(json_file: str | None, plot_file: str | None) -> None:
    """Asks rank 0, before a minute is spent, whether it could write the files. A collective call.

    Raises:
        ValueError: on all ranks, if it could not.
    """
    wrong = []
    for option, file in (("--json", json_file), ("--plot", plot_file)):
        if file and not os.access(Path(file).absolute().parent, os.W_OK):
            wrong.append(f"{option} {file}: its folder does not exist or cannot be written to")
    if plot_file and importlib.util.find_spec("matplotlib") is None:
        wrong.append(f"--plot {plot_file} needs matplotlib: pip install matplotlib")
    found = [wrong]
    dist.broadcast_object_list(found, 0)
    if found[0]:
        raise ValueError("; ".join(found[0]))


def _row(scheme: str, source: Source, density: float, budget: float) -> Row:
    rank, size = dist.get_rank(), dist.get_world_size()
    if scheme == "powersgd":
        host, port = meeting_place()
        task = Task(rank, size, host, port, budget, source)
        found = measure_in_child(task, 2 * budget + START_S)
        everywhere = torch.tensor([int(found is not None)], dtype=torch.int64, device="cpu")
        dist.all_reduce(everywhere, dist.ReduceOp.MIN)
        if found is None or not everywhere.item():
            return Row(scheme, note=f"failed, or did not end within {2 * budget + START_S:.0f} s")
        return Row(scheme, found[0], steps=found[1])
    workload = make_workload(source, rank)
    ddp, state = attach(scheme, workload, density)
    try:
        wrong = check(scheme, ddp, state, workload)
        if wrong:
            return Row(scheme, note=wrong)
        step_s, steps = timed(ddp, workload, budget)
        numel = sum(p.numel() for p in workload.model.parameters() if p.requires_grad)
        return Row(scheme, step_s, None, bytes_sent(scheme, state, numel, size), steps)
    finally:
        if state is not None:
            state.close()


def _over(begun: float, seconds: float) -> bool:
    """Whether rank 0's time is over. A collective call."""
    over = torch.tensor([int(time.monotonic() - begun > seconds)], dtype=torch.int64, device="cpu")
    dist.broadcast(over, 0)
    return bool(over.item())


def _one_rank() -> str:
    return (
        "one rank sends nothing, so there is nothing to measure. Start as many as the training has:\n"
        "  torchrun --nproc-per-node 4 -m commhooks bench\n"
        "  mpiexec -n 4 python -m mpi4py -m commhooks bench"
    )


@contextmanager
def _group() -> Iterator[None]:
    """Makes torch's default process group over gloo where there is none, and ends it afterwards.

    Raises:
        ValueError: no launcher started this process.
    """
    if dist.is_initialized():
        yield
        return
    started = launched()
    if started is None or started.world_size == 1:
        raise ValueError(_one_rank())
    if "MASTER_ADDR" in os.environ:
        dist.init_process_group("gloo")
    else:
        _beside_mpi()
    try:
        yield
    finally:
        dist.destroy_process_group()


def _beside_mpi() -> None:
    """Makes the process group with MPI's ranks: rank 0 opens a store, and MPI carries its address."""
    from ..transports.mpi import load_mpi

    comm = load_mpi().COMM_WORLD
    names = comm.allgather(socket.gethostname())
    host = "127.0.0.1" if len(set(names)) == 1 else names[0]
    make: Any = dist.TCPStore  # type: ignore[attr-defined]
    store = make(host, 0, comm.size, is_master=True, wait_for_workers=False) if comm.rank == 0 else None
    port = comm.bcast(store.port if store else None)
    store = store or make(host, port, comm.size, is_master=False)
    dist.init_process_group("gloo", store=store, rank=comm.rank, world_size=comm.size)


def _plot(report: Report, file: Path) -> None:
    """Draws one bar a scheme: forward and backward, and what communication adds in the scheme's colour."""
    rows = [row for row in report.rows if row.exposed_s is not None]
    with figure(file, figsize=(WIDTH, 0.35 * len(rows) + 1.0)) as (_, axes):
        axis = axes[0][0]
        for row in rows:
            step_s = row.step_s or 0.0
            alone_s = min(report.alone_s, step_s)
            axis.barh(row.scheme, 1000 * alone_s, color=COLORS["none"], lw=0)
            axis.barh(
                row.scheme, 1000 * (step_s - alone_s), left=1000 * alone_s, color=color(row.scheme), lw=0
            )
            axis.text(1000 * step_s, row.scheme, f" {1000 * step_s:,.1f} ms", va="center")
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.grid(axis="y", visible=False)
        axis.set_xlabel("ms a step: forward and backward in grey, communication in the colour of the scheme")
        hosts = f"{len(report.hosts)} host{'' if len(report.hosts) == 1 else 's'}"
        axis.set_title(
            f"Measured: {report.model}, {report.world_size} ranks on {hosts}, density {report.density:g}"
        )
