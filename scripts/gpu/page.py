"""The texts: the report of one run, and what the project's pages say about GPUs out of all published runs."""

from __future__ import annotations

import argparse
import importlib
import json
import re
from pathlib import Path
from typing import Any

from gpu.machine import ROOT
from gpu.targets import AGAIN, PLAIN, SCALED, overhead

Run = dict[str, Any]
FOLDER = "docs/performance"
NEVER = [
    "**Never run on a GPU.** The CUDA kernels compile, and their logic has run on the CPU. No hook has run over",
    "NCCL, and nothing has run between two GPUs. `scripts/gpu_check` is what a machine with a GPU runs first.",
]


def report(run: Run) -> str:
    """One page on a run: targets, steps, where the time goes, every check."""
    head = "A dry run: no GPU, no figure" if run["dry_run"] else f"{run['device']}, {run['date']}"
    count = {verdict: sum(c["verdict"] == verdict for c in run["checks"]) for verdict in _verdicts(run)}
    verdicts = ", ".join(f"{number} {verdict}" for verdict, number in count.items())
    lines = [f"# gpu_check: {head}", "", f"{verdicts}; {run['seconds']:g} s. {_versions(run)}", ""]
    if not run["dry_run"]:
        lines += _targets(run) + _split(run) + _steps(run) + _host(run)
    lines += [
        "## Checks",
        "",
        "| check | verdict | s | SM MHz | W | C | |",
        "| --- | --- | ---: | --- | --- | --- | --- |",
    ]
    for check in run["checks"]:
        gpu = check.get("gpu", {})
        ranges = [_range(gpu.get(name)) for name in ("sm_mhz", "watt", "celsius")]
        detail = check["detail"] if check["verdict"] in ("pass", "skip") else _first_and_last(check["detail"])
        lines.append(_row(check["name"], check["verdict"], f"{check['seconds']:g}", *ranges, detail[-300:]))
    return "\n".join(
        [
            *lines,
            "",
            "Everything that was printed: `logs.tar.gz`. Everything that was measured: `gpu.json`.",
            "",
        ]
    )


def _verdicts(run: Run) -> list[str]:
    return list(dict.fromkeys(check["verdict"] for check in run["checks"]))


def _versions(run: Run) -> str:
    names = ("driver", "torch", "nccl", "python", "commit")
    return ", ".join(f"{name} {str(run[name])[:12]}" for name in names if run.get(name)) + "."


def _range(values: list[float] | None) -> str:
    return "" if not values else f"{values[0]:g} to {values[1]:g}"


def _row(*cells: object) -> str:
    return "| " + " | ".join(str(cell).replace("|", "/").replace("\n", " ") for cell in cells) + " |"


def _first_and_last(text: str) -> str:
    lines = text.strip().splitlines() or [""]
    return lines[0] if len(lines) == 1 else f"{lines[0][:150]} ... {lines[-1][:150]}"


def _targets(run: Run) -> list[str]:
    lines = ["## Targets", "", "| | wanted | measured | |", "| --- | --- | ---: | --- |"]
    for row in run.get("targets", []):
        measured = "not measured" if row["measured"] is None else f"{row['measured']:g}"
        met = {True: "met", False: f"**not met**: {row['why']}".rstrip(": "), None: ""}[row["met"]]
        lines.append(_row(row["name"], row["wanted"], measured, met))
    return [*lines, ""]


def _split(run: Run) -> list[str]:
    split = run["results"].get("split", {})
    if not split:
        return []
    parts = sorted({name for case in split.values() for name in case["parts"]})
    lines = [
        "## Where a selection's time goes",
        "",
        _row("microseconds", "a call", *parts, "between kernels"),
    ]
    lines.append(_row("---", *["---:"] * (len(parts) + 2)))
    for name, case in split.items():
        lines.append(
            _row(
                name,
                f"{case['us']:g}",
                *(f"{case['parts'].get(p, 0.0):g}" for p in parts),
                f"{case['gaps']:g}",
            )
        )
    for case, kernels in run["results"].get("ncu", {}).items():
        for kernel, metrics in kernels.items():
            text = ", ".join(f"{name} {value:g}" for name, value in metrics.items())
            lines.append(f"\nncu, {case}, {kernel}: {text}")
    return [*lines, ""]


def _steps(run: Run) -> list[str]:
    lines: list[str] = []
    for model, title in (
        ("resnet50", "ResNet-50, batch 128, bf16"),
        ("gpt", "GPT of 124M, 8 x 1024 tokens, bf16"),
    ):
        steps = {name: step for name, step in run["results"].get(model, {}).items() if isinstance(step, dict)}
        if not steps:
            continue
        lines += [
            f"## Step time: {title}",
            "",
            "| one rank, NCCL | ms | against plain, % | tail, ms | worker: select, exchange, write back, ms |",
        ]
        lines.append("| --- | ---: | ---: | ---: | --- |")
        for name, step in steps.items():
            percent = (
                None if name in (PLAIN, AGAIN, f"{PLAIN}{SCALED}") else overhead(run["results"], model, name)
            )
            worker = ", ".join(f"{ms:g}" for ms in step.get("worker_ms", {}).values())
            told = "" if percent is None else f"{percent:+.1f}"
            lines.append(_row(name, f"{step['ms']:g}", told, f"{step['tail_ms']:g}", worker))
        lines.append("")
    return lines


def _host(run: Run) -> list[str]:
    host = run["results"].get("host", {})
    return (
        ["Host cost of a call, us: " + ", ".join(f"{name} {us:g}" for name, us in host.items()) + ".", ""]
        if host
        else []
    )


def published() -> list[Run]:
    """All runs that were published, by device."""
    return [json.loads(file.read_text()) for file in sorted((ROOT / FOLDER).glob("gpu-*.json"))]


def state(figures: str = "") -> list[str]:
    """One paragraph on all published runs, for README and the kernels' page. ``figures``: the page with the figures."""
    runs = published()
    if not runs:
        return NEVER
    lines = []
    for run in runs:
        known = [row["met"] for row in run["targets"] if row["met"] is not None]
        bad = [check["name"] for check in run["checks"] if check["verdict"] not in ("pass", "skip")]
        passed = "every check passed" if not bad else f"not passed: {', '.join(bad)}"
        lines.append(
            f"Run on one {run['device']} ({run['date']}): {sum(known)} of {len(known)} targets met, {passed}."
        )
    where = f" ([the figures]({figures}#on-one-gpu))" if figures else ""
    return [*lines, f"**Never run between two GPUs**{where}."]


def figures() -> list[str]:
    """The section of docs/performance.md: :func:`state`, and the tables of every run."""
    lines = state()
    for run in published():
        lines += [
            "",
            f"### {run['device']}",
            "",
            f"{run['date']}. {_versions(run)} Record: `{file_of(run).name}`.",
            "",
        ]
        tables = _targets(run) + _split(run) + _steps(run) + _host(run)
        lines += [line.replace("## ", "#### ", 1) if line.startswith("## ") else line for line in tables]
    return lines if not lines[-1] == "" else lines[:-1]


def file_of(run: Run) -> Path:
    """Where a run is published."""
    device = re.sub(r"[^a-z0-9]+", "-", run["device"].lower()).strip("-")
    return ROOT / FOLDER / f"gpu-{device}.json"


def publish(folder: Path) -> list[Path]:
    """Copies a run's JSON to docs/performance and writes all pages anew.

    Args:
        folder: the output of ``scripts/gpu_check``.

    Returns:
        The record, and the pages that may have changed.

    Raises:
        ValueError: the run was a dry one, or measured nothing that a target asks for.
    """
    run = json.loads((folder / "gpu.json").read_text())
    if run["dry_run"]:
        raise ValueError(f"{folder}/gpu.json is of a dry run: it has no figures")
    if all(row["measured"] is None for row in run["targets"][:-1]):  # the last one is of the checks
        raise ValueError(f"{folder}/gpu.json has no figure of any target")
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in run.items())
    file_of(run).write_text(f"{{{lines}}}\n")
    pages = importlib.import_module("benchmarks.harness.pages")  # which render these texts
    pages.run(argparse.Namespace(check=False, pictures=False))
    return [file_of(run), *(ROOT / name for name in pages.PAGES)]
