"""The accuracy study under Horovod, in one job of 4 ranks (run by scripts/accuracy --horovod).

The settings are those of `accuracy.py`. The study writes docs/results/horovod.jsonl and horovod.md. It runs only what
horovod.jsonl does not hold yet, so it can be done in parts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import table as tables
from training import horovod, launch
from training.log import count, table

from . import accuracy

# name, scheme, Horovod's own optimizer, error feedback, momentum (None: the study's)
CASES: tuple[tuple[str, str, bool, bool, float | None], ...] = (
    ("dense (Horovod's own)", "dense", False, True, None),
    ("top-k, our optimizer", "topk", False, True, None),
    ("gTop-k, our optimizer", "gtopk", False, True, None),
    ("random-k with momentum, our optimizer", "randomk", False, True, None),
    ("random-k, our optimizer", "randomk", False, True, 0.0),
    ("top-k without feedback, our optimizer", "topk", False, False, None),
    ("gTop-k without feedback, our optimizer", "gtopk", False, False, None),
    ("random-k without feedback, our optimizer", "randomk", False, False, None),
    ("top-k, stock optimizer", "topk", True, True, None),
    ("random-k, stock optimizer", "randomk", True, True, 0.0),
)


def main() -> None:
    """Runs what is missing, rank 0 writes after each run."""
    p = argparse.ArgumentParser(
        prog="scripts/accuracy --horovod",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--epochs", type=int, default=40, help="of the MLP; ResNet-20 gets half (40)")
    p.add_argument("--density", type=float, default=0.01)
    p.add_argument("--warmup", type=int, default=4)
    p.add_argument("--momentum", type=float, default=0.9)
    p.add_argument("--models", nargs="+", choices=tuple(accuracy.MODELS), default=list(accuracy.MODELS))
    p.add_argument("--output", type=Path, default=accuracy.ROOT / "docs" / "results")
    study = p.parse_args()
    import torch

    torch.set_num_threads(1)
    path = study.output / "horovod.jsonl"
    runs: list[dict[str, Any]] = accuracy.saved(path)[1] if path.exists() else []
    with horovod.session("cpu", 120.0) as world:
        for model in study.models:
            for seed in study.seeds:
                for name, scheme, stock, feedback, momentum in CASES:
                    if any((r["name"], r["model"], r["seed"]) == (name, model, seed) for r in runs):
                        continue
                    horovod.use_horovod(stock)
                    momentum = study.momentum if momentum is None else momentum
                    started = time.perf_counter()
                    result = accuracy.one(study, world, (model, scheme, feedback, momentum), seed)
                    runs.append({"name": name, "stock": stock, **result})
                    if world.is_main:
                        write(study, path, runs, world)
                        seconds = time.perf_counter() - started
                        print(
                            f"{model} {name} {seed}: {result['test_accuracy']:.2%} ({seconds:.0f} s)",
                            flush=True,
                        )
    launch.leave()


def write(study: Any, path: Path, runs: list[dict[str, Any]], world: launch.World) -> None:
    """horovod.jsonl with every run, horovod.md with the tables."""
    settings = {
        name: value for name, value in vars(study).items() if name not in ("output", "seeds", "models")
    }
    about = {"bench": accuracy.STUDY, "settings": settings, "ranks": world.size, "launcher": world.launcher}
    accuracy.save(path, about, runs)
    path.with_suffix(".md").write_text(page(study, runs, world.size))


def rendered(path: Path) -> str:
    """The page from a file of records."""
    about, runs = accuracy.saved(path)
    return page(argparse.Namespace(**about["settings"]), runs, about["ranks"])


def page(study: Any, runs: list[dict[str, Any]], ranks: int) -> str:
    """The tables, their verdict computed."""
    parts = [
        "# Accuracy on digits under Horovod",
        "",
        f"`scripts/accuracy --horovod`: {ranks} ranks on one machine, "
        f"density {study.density:g} after a warm-up of {study.warmup} epochs, the settings of "
        "[the DDP study](accuracy.md), which says why random-k stands here twice; 360 test images (one image is 0.28 points). Our optimizer "
        "selects in fused buckets, the stock optimizer with our compression in each parameter. Bytes are a rank's "
        "mean over all steps, warm-up included; all-reduces and all-gathers are counted as rings.",
    ]
    for model in dict.fromkeys(run["model"] for run in runs):
        names = [name for name, *_ in CASES if any(r["name"] == name and r["model"] == model for r in runs)]
        groups = {name: [r for r in runs if r["name"] == name and r["model"] == model] for name in names}
        means = {
            name: statistics.mean(100 * r["test_accuracy"] for r in group) for name, group in groups.items()
        }
        lines = []
        for name, group in groups.items():
            points = [100 * r["test_accuracy"] for r in group]
            spread = f" ± {statistics.stdev(points):.2f}" if len(group) > 1 else ""
            behind = f"{means[names[0]] - means[name]:+.2f}"
            sent = count(statistics.mean(r["bytes_sent_per_step"] for r in group))
            feedback = "-" if name == names[0] else "yes" if group[0]["error_feedback"] else "no"
            span = f"{min(points):.2f} to {max(points):.2f}"
            momentum, lr = f"{group[0]['momentum']:g}", f"{group[0]['lr']:g}"
            mean = f"{means[name]:.2f}{spread}"
            lines.append((name, len(group), feedback, momentum, lr, mean, span, behind, sent))
        headings = (
            "optimizer and scheme",
            "seeds",
            "error feedback",
            "momentum",
            "lr",
            "test accuracy, %",
            "range",
            "points behind dense",
            "bytes a step",
        )
        epochs = len(groups[names[0]][0]["accuracy_by_epoch"])
        parts += ["", f"## {model}, {epochs} epochs", "", table(headings, lines)]
        within = [name for name in names[1:] if means[names[0]] - means[name] <= 1.0]
        beyond = [name for name in names[1:] if name not in within]
        parts += [
            "",
            f"Within one point of dense: {'; '.join(within) or 'none'}. Not: {'; '.join(beyond) or 'none'}.",
        ]
        left_out = [name for name, *_ in CASES if name not in names]
        parts += ["", f"Not run here: {'; '.join(left_out)}."] if left_out else []
    return tables.page(parts)


if __name__ == "__main__":
    main()
