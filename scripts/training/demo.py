"""The demonstration: one job under four schemes, a table and a figure (run by scripts/demo)."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Sequence

from benchmarks.harness.figure import WIDTH, color, figure, label_ends
from benchmarks.harness.records import save

from commhooks.native import speed

from .log import count, read, table

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
LAUNCHER_PREFIXES = ("OMPI_", "PMIX_", "PRTE_", "PMI_", "HYDI_", "HYDRA_")


@dataclass(frozen=True)
class Entry:
    """One line of the table: how it is called, how it is started, the options of train.py."""

    name: str
    mpi: bool
    options: tuple[str, ...]


WITH_MOMENTUM = ("--momentum", "0.9", "--lr", "0.05")
ENTRIES = (
    Entry("dense (DDP)", False, ("--scheme", "dense", *WITH_MOMENTUM)),
    Entry("top-k, all-gather", False, ("--scheme", "topk", *WITH_MOMENTUM)),
    Entry("gTop-k, MPI", True, ("--scheme", "gtopk", "--transport", "mpi", *WITH_MOMENTUM)),
    # a place comes up every 1/density steps with all that was gathered since: momentum on top would overshoot
    Entry("random-k", False, ("--scheme", "randomk", "--lr", "0.3")),
)
RANDOM_FACTOR = 5  # a density at which each place is sent several times in so short a run


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs all entries one after the other; ends with the table on standard output."""
    p = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    p.add_argument("--epochs", type=int, default=8)
    p.add_argument("--density", type=float, default=0.01)
    p.add_argument("--ranks", type=int, default=4)
    p.add_argument("--model", default="resnet20", choices=("resnet20", "mlp"))
    p.add_argument("--output", type=Path, default=Path("demo.png"), help="the figure (demo.png)")
    p.add_argument("--keep", type=Path, metavar="DIR", help="keep the logs here")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the table's records there, one a line")
    speed.add_option(p)
    options = p.parse_args(arguments)
    reason = speed.refusal()
    if reason is not None and not options.allow_reference:
        print(f"scripts/demo: {reason}", file=sys.stderr)
        sys.exit(2)
    folder = options.keep or Path(tempfile.mkdtemp(prefix="commhooks-demo-"))
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    logs = {}
    for number, entry in enumerate(ENTRIES):
        print(f"demo: {entry.name} ({number + 1} of {len(ENTRIES)})", file=sys.stderr, flush=True)
        logs[entry.name] = folder / f"{number}-{entry.options[1]}.jsonl"
        train(entry, options, logs[entry.name])
    runs = {name: read(path) for name, path in logs.items()}
    records = [record(name, run) for name, run in runs.items()]
    if options.json:
        save(records, options.json)
    print(f"\n{title(runs, options)}\n")
    print(table(HEAD, rows(records)), flush=True)
    draw(runs, options.output, title(runs, options))
    if options.keep is None:
        shutil.rmtree(folder)
    print(f"\nfigure: {options.output} ({time.monotonic() - started:.0f} s in all)")


def train(entry: Entry, options: Any, log: Path) -> None:
    """One training run as a job of its own; ends the demonstration with its status if it fails."""
    if entry.mpi:
        mpiexec = Path(sys.executable).parent / "mpiexec"
        launcher = [str(mpiexec), "-n", str(options.ranks), sys.executable, "-m", "mpi4py"]
    else:
        # the loopback address: otherwise torchrun looks the host's own name up, which may take for ever
        settings = ("--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={options.ranks}")
        launcher = [sys.executable, "-m", "torch.distributed.run", *settings]
    density = options.density * (RANDOM_FACTOR if "randomk" in entry.options else 1)
    given = [
        "--task",
        "digits",
        "--model",
        options.model,
        "--epochs",
        str(options.epochs),
        "--batch-size",
        "32",
    ]
    given += ["--density", f"{min(1.0, density):g}", "--log-file", str(log)]
    env = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER_PREFIXES)}
    env["OMP_NUM_THREADS"] = "1"
    env.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    process = subprocess.Popen(
        [*launcher, str(TRAIN), *given, *entry.options],
        env=env,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        status = process.wait(timeout=600)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    if status != 0:
        sys.exit(f"demo: the run under {entry.name!r} failed with status {status}")


def title(runs: dict[str, list[dict[str, Any]]], options: Any) -> str:
    """What was trained, in a line."""
    start = next(iter(runs.values()))[0]
    return (
        f"{start['options']['model']} ({start['parameters']:,} parameters) on digits, {options.ranks} ranks, "
        f"{options.epochs} epochs of {start['steps_per_epoch']} steps"
    )


def record(name: str, run: list[dict[str, Any]]) -> dict[str, Any]:
    """A run's line of the table. `train_loss` is the mean of the last five steps, bytes are a step's and rank's."""
    end = next(event for event in run if event["event"] == "end")
    last = [event["loss"] for event in run if event["event"] == "step"][-5:]
    kept = {key: end[key] for key in ("density", "test_loss", "test_accuracy", "bytes_sent_per_step")}
    return {"bench": "demo", "scheme": name, "train_loss": sum(last) / len(last), **kept}


HEAD = ("scheme", "density", "train loss", "test loss", "test accuracy", "bytes a step", "ratio")


def rows(records: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The table's rows: `ratio` is the first scheme's bytes over those of each."""
    dense = records[0]["bytes_sent_per_step"]
    return [
        (
            r["scheme"],
            f"{r['density']:g}",
            f"{r['train_loss']:.3f}",
            f"{r['test_loss']:.3f}",
            f"{r['test_accuracy']:.1%}",
            count(r["bytes_sent_per_step"]),
            f"{dense / r['bytes_sent_per_step']:.1f}" if r["bytes_sent_per_step"] else "-",
        )
        for r in records
    ]


def draw(runs: dict[str, list[dict[str, Any]]], path: Path, heading: str) -> None:
    """Training loss against the step and against megabytes sent, one line a scheme."""
    schemes = ("dense", "topk", "gtopk", "randomk")
    with figure(path, 1, 2, figsize=(WIDTH, 3.4), sharey=True) as (drawn, axes):
        left, right = axes[0]
        for (name, run), scheme in zip(runs.items(), schemes):
            steps = [event for event in run if event["event"] == "step"]
            loss = smooth([event["loss"] for event in steps])
            sent, total = [], 0.0
            for event in steps:
                total += event["bytes_sent"]
                sent.append(total / 1e6)
            left.plot([event["step"] for event in steps], loss, color=color(scheme), label=name)
            right.plot(sent, loss, color=color(scheme), label=name)
        left.set(xlabel="step", ylabel="training loss (mean over ranks, smoothed)", yscale="log")
        right.set(xlabel="megabytes sent by a rank", xscale="log")
        drawn.suptitle(f"Measured: {heading}")
        label_ends(right, right.get_lines())


def smooth(values: Sequence[float], weight: float = 0.8) -> list[float]:
    """Exponential moving average, started at the first value."""
    result: list[float] = []
    for value in values:
        result.append(value if not result else weight * result[-1] + (1 - weight) * value)
    return result


if __name__ == "__main__":
    main()
