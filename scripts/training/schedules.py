"""The learning rate of a step, and how long a run and its warm-up are."""

from __future__ import annotations

import math
from typing import Any

SCHEDULES = ("constant", "cosine", "step", "exponential")


def learning_rate(options: Any, step: int, total: int, steps_per_epoch: int) -> float:
    """The rate of a step: a linear rise over `--lr-warmup` steps, then the course that `--lr-schedule` names.

    Args:
        options: the command line: `lr`, `lr_schedule`, `lr_warmup`, `lr_every`, `lr_gamma`.
        step: from 0.
        total: steps of the run; cosine falls from the end of the warm-up to zero there.
        steps_per_epoch: step drops after every `lr_every` epochs, exponential a little at each step; both are counted
            from step 0.
    """
    if step < options.lr_warmup:
        return float(options.lr) * (step + 1) / options.lr_warmup
    factor = 1.0
    if options.lr_schedule == "cosine":
        course = (step - options.lr_warmup) / max(1, total - options.lr_warmup)
        factor = 0.5 * (1.0 + math.cos(math.pi * course))
    elif options.lr_schedule == "step":
        factor = options.lr_gamma ** (step // (options.lr_every * steps_per_epoch))
    elif options.lr_schedule == "exponential":
        factor = options.lr_gamma ** (step / steps_per_epoch)
    return float(options.lr) * factor


def total_steps(options: Any, steps_per_epoch: int) -> int:
    """Steps of the whole run: `--steps`, or all of `--epochs`."""
    return int(options.steps or options.epochs * steps_per_epoch)


def note_on_warmup(options: Any, steps_per_epoch: int) -> str | None:
    """Says that the warm-up of the density is as long as the run, where it is: its last density is never reached."""
    warmup, total = (
        options.warmup_steps or options.warmup * steps_per_epoch,
        total_steps(options, steps_per_epoch),
    )
    if options.scheme == "dense" or warmup < total:
        return None
    return (
        f"train.py: the warm-up of the density takes {warmup} steps and the run {total}: "
        f"density {options.density} is never reached"
    )
