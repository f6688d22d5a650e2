"""Checkpoints of a job: DIR/step-00000120/common.pt, written by rank 0, and rank0.pt, rank1.pt, ... by each rank.

A checkpoint appears under its name only when it is complete; the two newest are kept.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist

from .launch import World

KEPT = 2


def save(folder: Path, step: int, world: World, common: dict[str, Any], mine: dict[str, Any]) -> Path:
    """Writes a checkpoint; a collective call.

    Args:
        folder: where checkpoints are collected.
        step: steps done.
        world: the ranks.
        common: what is the same on all ranks; rank 0's is written.
        mine: what is this rank's own.
    """
    target, part = folder / f"step-{step:08d}", folder / f".step-{step:08d}.part"
    if world.is_main:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    dist.barrier()
    torch.save(mine, part / f"rank{world.rank}.pt")
    if world.is_main:
        torch.save({**common, "step": step, "world_size": world.size}, part / "common.pt")
    dist.barrier()
    if world.is_main:
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
        for old in _all(folder)[:-KEPT]:
            shutil.rmtree(old)
    dist.barrier()
    return target


def load(folder: Path, world: World) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """The newest checkpoint: what is common, and the parts of the ranks; None if there is none.

    With the world size it was written at, the list holds this rank's part alone; with another one all parts.
    """
    found = _all(folder)
    if not found:
        return None
    common = _read(found[-1] / "common.pt")
    size = common["world_size"]
    ranks = [world.rank] if size == world.size else range(size)
    return common, [_read(found[-1] / f"rank{rank}.pt") for rank in ranks]


def random_state(device: torch.device) -> dict[str, Any]:
    """State of the generators that training may draw from: torch, numpy, Python, and the device's."""
    name, keys, *rest = numpy.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "numpy": [name, torch.from_numpy(keys.astype("int64")), *rest],
        "python": random.getstate(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Puts back what `random_state` took."""
    torch.set_rng_state(state["torch"])
    name, keys, *rest = state["numpy"]
    numpy.random.set_state((name, keys.numpy().astype("uint32"), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def check_options(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Compares the options that make the course of a run.

    Raises:
        ValueError: naming each option that differs, with both values.
    """
    differing = [
        f"{name}: {saved.get(name)!r} in the checkpoint, {now.get(name)!r} now"
        for name in sorted({*saved, *now})
        if saved.get(name) != now.get(name)
    ]
    if differing:
        raise ValueError("cannot resume: " + "; ".join(differing))


def _all(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return content
