"""The accuracy study on 4 ranks: every scheme over several seeds in one job (run by scripts/accuracy)."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import records
from benchmarks.harness import table as tables
from benchmarks.harness.figure import WIDTH, color, figure, label_ends
from training import launch, loop, options
from training.log import count, table

ROOT = Path(__file__).resolve().parent.parent.parent
STUDY = "study"
"""`bench` of the line about the study."""
# scheme, error feedback, momentum (None: the study's). A coordinate that random-k sends every 1/density steps carries
# what was gathered since: with momentum on top it overshoots, so it is shown without as well.
CASES: tuple[tuple[str, bool, float | None], ...] = (
    ("dense", True, None),
    ("topk", True, None),
    ("gtopk", True, None),
    ("randomk", True, None),
    ("randomk", True, 0.0),
    ("topk", False, None),
    ("gtopk", False, None),
    ("randomk", False, None),
)
NAMES = {"dense": "dense (DDP)", "topk": "top-k", "gtopk": "gTop-k", "randomk": "random-k"}
# by model: learning rate, the same without momentum, batch per rank, share of the epochs
MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"lr": 0.1, "plain_lr": 0.1, "batch_size": 16, "epochs": 1.0},
    "resnet20": {"lr": 0.05, "plain_lr": 0.3, "batch_size": 32, "epochs": 0.5},
}


def main() -> None:
    """Trains everything, then writes the three files on rank 0."""
    p = argparse.ArgumentParser(prog="scripts/accuracy", description=__doc__)
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--epochs", type=int, default=40, help="of the MLP; ResNet-20 gets half (40)")
    p.add_argument("--density", type=float, default=0.01)
    p.add_argument("--warmup", type=int, default=4, help="epochs of density warm-up (4)")
    p.add_argument("--momentum", type=float, default=0.9)
    p.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    p.add_argument("--output", type=Path, default=ROOT / "docs" / "results")
    p.add_argument("--redraw", action="store_true", help="write page and figure again from accuracy.jsonl")
    study = p.parse_args()
    if study.redraw:
        redraw(study)
        return
    import torch

    torch.set_num_threads(1)
    started = time.perf_counter()
    with launch.session() as world:
        results: list[dict[str, Any]] = []
        cases = [(model, *case) for model in study.models for case in CASES]
        for number, (model, scheme, feedback, momentum) in enumerate(cases):
            for seed in study.seeds:
                momentum = study.momentum if momentum is None else momentum
                results.append(one(study, world, (model, scheme, feedback, momentum), seed))
                if world.is_main:
                    last = results[-1]
                    print(
                        f"accuracy: {number + 1}/{len(cases)} {model} {scheme} feedback={feedback} seed={seed} "
                        f"momentum={momentum:g} {last['test_accuracy']:.2%} ({time.perf_counter() - started:.0f} s)",
                        file=sys.stderr,
                        flush=True,
                    )
        if world.is_main:
            write(study, results, world.size, time.perf_counter() - started)
    launch.leave()


def one(study: Any, world: launch.World, case: tuple[str, str, bool, float], seed: int) -> dict[str, Any]:
    """One run: the loop's summary with what was asked for, and the test accuracy after each epoch."""
    model, scheme, feedback, momentum = case
    setting = MODELS[model]
    lr = setting["lr"] if momentum else setting["plain_lr"]
    epochs = max(1, round(study.epochs * setting["epochs"]))
    given = [
        "--task",
        "digits",
        "--model",
        model,
        "--scheme",
        scheme,
        "--density",
        study.density,
        "--seed",
        seed,
    ]
    given += ["--epochs", epochs, "--batch-size", setting["batch_size"], "--lr", lr, "--quiet"]
    given += ["--momentum", momentum, "--warmup", min(study.warmup, epochs)]
    given += [] if feedback else ["--no-error-feedback"]
    run = loop.Run(options.parse([str(part) for part in given]), world)
    curve: list[float] = []
    evaluate = run._evaluate

    def recorded() -> None:
        evaluate()
        curve.append(run.evaluation["test_accuracy"])

    run._evaluate = recorded  # type: ignore[method-assign]
    asked = {"model": model, "seed": seed, "lr": lr, "momentum": momentum}
    return {**asked, **run.train(), "error_feedback": feedback, "accuracy_by_epoch": curve}


def summarise(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread over seeds, by model, scheme and feedback, in the order of the runs."""
    groups: dict[tuple[str, str, bool, float], list[dict[str, Any]]] = {}
    for result in results:
        key = (result["model"], result["scheme"], result["error_feedback"], result["momentum"])
        groups.setdefault(key, []).append(result)
    baseline = {key[0]: runs for key, runs in groups.items() if key[1] == "dense"}
    rows = []
    for (model, scheme, feedback, momentum), runs in groups.items():
        accuracy = [100 * run["test_accuracy"] for run in runs]
        dense = [100 * run["test_accuracy"] for run in baseline[model]]
        rows.append(
            {
                "model": model,
                "scheme": scheme,
                "error_feedback": feedback,
                "momentum": momentum,
                "lr": runs[0]["lr"],
                "seeds": len(runs),
                "mean": statistics.mean(accuracy),
                "spread": statistics.stdev(accuracy) if len(runs) > 1 else 0.0,
                "lowest": min(accuracy),
                "highest": max(accuracy),
                "behind_dense": statistics.mean(dense) - statistics.mean(accuracy),
                "bytes_sent_per_step": statistics.mean(run["bytes_sent_per_step"] for run in runs),
                "epochs": len(runs[0]["accuracy_by_epoch"]),
                "curve": [
                    statistics.mean(values) for values in zip(*(run["accuracy_by_epoch"] for run in runs))
                ],
            }
        )
    return rows


def write(study: Any, results: list[dict[str, Any]], ranks: int, elapsed_s: float) -> None:
    """accuracy.jsonl with every run, accuracy.png, accuracy.md."""
    rows = summarise(results)
    settings = {name: value for name, value in vars(study).items() if name not in ("output", "redraw")}
    about = {"bench": STUDY, "settings": settings, "ranks": ranks, "elapsed_s": round(elapsed_s, 1)}
    save(study.output / "accuracy.jsonl", about, results)
    draw(rows, study.output / "accuracy.png")
    (study.output / "accuracy.md").write_text(page(study, rows, ranks, elapsed_s))
    print((study.output / "accuracy.md").read_text(), flush=True)


def save(path: Path, about: records.Record, runs: list[dict[str, Any]]) -> None:
    """Writes a line about the study, then one for each run. What is not a number is null."""
    for run in runs:
        run.update({key: None for key, value in run.items() if value != value})  # NaN is not JSON
    records.save([about, *({"bench": "run", **run} for run in runs)], path)


def saved(path: Path) -> tuple[records.Record, list[dict[str, Any]]]:
    """What :func:`save` wrote: the line about the study, and the runs."""
    about, *runs = records.load(path)
    return about, runs


def redraw(study: Any) -> None:
    """Page and figure from the results of the last study, with its settings."""
    about, runs = saved(study.output / "accuracy.jsonl")
    for key, value in about["settings"].items():
        setattr(study, key, value)
    write(study, runs, about["ranks"], about["elapsed_s"])


def rendered(path: Path) -> str:
    """The page from a file of records."""
    about, runs = saved(path)
    return page(argparse.Namespace(**about["settings"]), summarise(runs), about["ranks"], about["elapsed_s"])


def page(study: Any, rows: list[dict[str, Any]], ranks: int, elapsed_s: float) -> str:
    """The page, its verdict computed from the rows."""
    parts = [
        "# Accuracy on digits with and without error feedback",
        "",
        f"`scripts/accuracy`: {ranks} ranks over gloo on one machine, density {study.density:g} after a warm-up of "
        f"{study.warmup} epochs (exponential from 0.25), momentum {study.momentum:g}, learning rate down to zero along a "
        f"cosine, {len(study.seeds)} seeds, 360 test images (one image is 0.28 points). With error feedback the "
        "momentum is in the memory, without it in the optimizer. Bytes are the mean over all steps, warm-up included; "
        "those of dense are a ring all-reduce's by formula. Learning rates were not searched; those of random-k "
        "without momentum come from a few trials with seed 0.",
        "",
        "Why random-k stands here twice: a place that is sent every 1/density steps brings all gradients gathered since, "
        "which acts like a long momentum; with momentum in the memory on top of it the same learning rate overshoots.",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        lines = [
            (
                NAMES[row["scheme"]],
                "-" if row["scheme"] == "dense" else "yes" if row["error_feedback"] else "no",
                f"{row['momentum']:g}",
                f"{row['lr']:g}",
                f"{row['mean']:.2f} ± {row['spread']:.2f}",
                f"{row['lowest']:.2f} to {row['highest']:.2f}",
                f"{row['behind_dense']:+.2f}",
                count(row["bytes_sent_per_step"]),
            )
            for row in mine
        ]
        headings = (
            *("scheme", "error feedback", "momentum", "lr"),
            *("test accuracy, %", "range", "points behind dense", "bytes a step"),
        )
        parts += [
            "",
            f"## {model}, {mine[0]['epochs']} epochs",
            "",
            table(headings, lines),
            "",
            verdict(mine),
        ]
    parts += [
        "",
        "![test error by epoch](accuracy.png)",
        "",
        f"± is the standard deviation over seeds. Every run is in [accuracy.jsonl](accuracy.jsonl); the study took "
        f"{elapsed_s / 60:.0f} minutes here.",
    ]
    return tables.page(parts)


def verdict(rows: list[dict[str, Any]]) -> str:
    """Whether top-k and gTop-k with error feedback come within a point of dense, and what the others do."""
    within, beyond = [], []
    for row in rows:
        if row["scheme"] != "dense":
            (within if row["behind_dense"] <= 1.0 else beyond).append(name(row))
    return f"Within one point of dense: {'; '.join(within) or 'none'}. Not: {'; '.join(beyond) or 'none'}."


def name(row: dict[str, Any]) -> str:
    """How a row is called in a sentence and in the figure."""
    without = [] if row["error_feedback"] else ["no feedback"]
    without += [] if row["momentum"] else ["no momentum"]
    return NAMES[row["scheme"]] + (f" ({', '.join(without)})" if without else "")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Mean test error by epoch; full lines with error feedback (dashed: no momentum), dotted ones without."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    least = 100 / 360 / 3  # %: one image of one seed; an error of 0 has no place on a logarithmic axis
    from matplotlib.ticker import LogLocator, NullFormatter

    with figure(path, len(models), 1, figsize=(WIDTH, 3.1 * len(models))) as (drawn, axes):
        for axis, model in zip(axes[:, 0], models, strict=True):
            lines = []
            for row in rows:
                if row["model"] == model:
                    style = ":" if not row["error_feedback"] else "-" if row["momentum"] else "--"
                    error = [max(least, 100 * (1 - v)) for v in row["curve"]]
                    epochs = range(1, len(error) + 1)
                    lines += axis.plot(epochs, error, style, color=color(row["scheme"]), label=name(row))
            axis.set(title=model, xlabel="epoch", ylabel="test error, %", yscale="log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
            label_ends(axis, lines)
        drawn.suptitle("Measured: test error on digits, mean over seeds")


if __name__ == "__main__":
    main()
