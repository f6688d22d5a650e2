"""The command line of train.py; every option has a default, several by task."""

from __future__ import annotations

import argparse
from typing import Any, Callable, Sequence

import torch

from commhooks.transports import NAMES

from .averaging import AVERAGING_HELP, KINDS, START_HELP, SYNC_HELP, TOPOLOGIES, WIRE_BITS
from .averaging import check as check_averaging
from .data_text import LEVELS
from .gpt import SIZES
from .optimizers import OPTIMIZERS
from .schedules import SCHEDULES
from .strategies import SCHEMES
from .tasks import LANGUAGE_MODELS, MODELS, TASKS

# learning rates by task, found by trying on the dense baseline; PTB's and CIFAR-10's are in the range of the gTop-k paper
BY_TASK: dict[str, dict[str, Any]] = {
    "digits": {"model": "resnet20", "lr": 0.1, "epochs": 10, "batch_size": 32},
    "text": {"model": "lstm", "lr": 2.0, "epochs": 2, "batch_size": 16},
    "cifar10": {"model": "resnet20", "lr": 0.1, "epochs": 140, "batch_size": 32},
    "ptb": {"model": "lstm", "lr": 2.0, "epochs": 40, "batch_size": 20},
}
# what may differ between a run and the run that resumes it
FREE = (
    "log",
    "checkpoint",
    "checkpoint_every",
    "resume",
    "stop_after",
    "log_every",
    "data",
    "timeout",
    "transport",
    "quiet",
)

# defaults that depend on the model: of all, and of a gpt
PLAIN = {
    "optimizer": "sgd",
    "lr_warmup": 0,
    "weight_decay": 0.0,
    "window": 35,
    "dropout": 0.2,
    "text_size": 400_000,
    "sample": 0,
}
OF_GPT = {
    "optimizer": "adamw",
    "lr": 3e-3,
    "lr_warmup": 50,
    "weight_decay": 0.1,
    "window": 128,
    "dropout": 0.0,
    "text_size": 2_000_000,
    "sample": 200,
    "epochs": 1,
    "batch_size": 8,
}
POSITIVE = (
    "hidden",
    "window",
    "text_size",
    "epochs",
    "batch_size",
    "log_every",
    "lr",
    "lr_every",
    "timeout",
    "bucket_mb",
    "clip_norm",
    "checkpoint_every",
    "stop_after",
    "steps",
)

DESCRIPTION = """Data-parallel training with a sparse gradient exchange.

  torchrun --standalone --nproc-per-node 4 scripts/train.py --scheme topk --density 0.01
  mpiexec -n 4 python -m mpi4py scripts/train.py --scheme gtopk --transport mpi
"""


def parser() -> argparse.ArgumentParser:
    """All options, in groups. What has no default here gets it in `parse`, by the task or the averaging."""
    p = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_task(p.add_argument_group("what is trained"))
    _add_gradients(p.add_argument_group("how gradients travel"))
    _add_averaging(p.add_argument_group("how rarely models are averaged instead"))
    _add_training(p.add_argument_group("how it is trained"))
    _add_output(p.add_argument_group("what is written"))
    return p


def _add_task(group: Any) -> None:
    add = group.add_argument
    add(
        "--task",
        choices=TASKS,
        help="Data set; digits and text need no download (digits; with lstm or gpt: text).",
    )
    add("--data", metavar="DIR", help="Local folder of cifar10 (python version) or ptb (ptb.*.txt).")
    add(
        "--model", choices=MODELS, help="Network; gpt has 1M parameters (resnet20 for images, lstm for text)."
    )
    add("--hidden", type=int, default=128, help="Hidden units of mlp and lstm (128).")
    add("--dropout", type=float, help="Dropout of the lstm or gpt (0.2; gpt: 0).")
    add("--window", type=int, help="Tokens of a window of text (35; gpt: 128).")
    add("--level", choices=LEVELS, default="char", help="Tokens of --task text (char).")
    add(
        "--text-file", nargs="+", metavar="FILE", help="Text of --task text (the standard library's sources)."
    )
    add("--text-size", type=int, help="Characters read for --task text (400,000; gpt: 2,000,000).")
    add("--vocabulary", type=int, default=2000, help="Most tokens kept for --task text (2000).")


def _add_gradients(group: Any) -> None:
    add = group.add_argument
    add("--scheme", choices=SCHEMES, help="What is sent (topk; under --averaging: dense).")
    add("--density", type=float, default=0.01, help="Share of the gradient that is sent (0.01).")
    add("--bits", type=int, choices=WIRE_BITS, default=4, help="Bits an element of --scheme lowbit (4).")
    add("--transport", choices=NAMES, default="distributed", help="Network (distributed).")
    add("--momentum", type=float, help="Momentum (0; --averaging restarted and decentralized: 0.9).")
    add(
        "--momentum-in",
        choices=("memory", "optimizer"),
        help="Where a sparse hook's momentum and weight decay are kept (memory).",
    )
    add("--factor-masking", action="store_true", help="Zero the memory's velocity where a value was sent.")
    add(
        "--rescale-with-lr",
        action="store_true",
        help="Keep the residual in units of parameters (gTop-k's way).",
    )
    add("--warmup", type=int, default=0, metavar="EPOCHS", help="Epochs over which the density falls (0).")
    add("--warmup-steps", type=int, default=0, metavar="STEPS", help="The same, in steps (0).")
    add("--warmup-start", type=float, default=0.25, metavar="DENSITY", help="Density it falls from (0.25).")
    add(
        "--clip-norm",
        type=float,
        help="Largest gradient norm. A sparse hook clips each bucket of this rank, before the memory; dense the whole "
        "averaged gradient; local steps this rank's whole gradient (none; gpt: 1).",
    )
    add(
        "--no-error-feedback",
        dest="error_feedback",
        action="store_false",
        help="Drop what is not sent (it is kept).",
    )
    add(
        "--no-dense-crossover",
        dest="dense_crossover",
        action="store_false",
        help="Send sparsely even where a dense exchange takes fewer bytes.",
    )
    add("--bucket-mb", type=float, default=25.0, help="DDP's bucket_cap_mb (25).")
    add("--timeout", type=float, default=60.0, help="Seconds until a missing rank is an error (60).")


def _add_averaging(group: Any) -> None:
    add = group.add_argument
    add("--averaging", choices=("none", *KINDS), default="none", help=AVERAGING_HELP)
    add("--period", type=int, help="Local steps between two averagings (8; decentralized: 1).")
    add("--sync", default="every", metavar="SET", help=SYNC_HELP)
    add("--averaging-start", type=int, default=0, metavar="STEPS", help=START_HELP)
    add("--mu", type=float, help="Momentum of block, slowmo and diloco; 0: none (0.7; diloco: 0.9).")
    add("--outer-lr", type=float, help="Outer learning rate of slowmo and diloco (1; diloco: 0.7).")
    add(
        "--wire-bits",
        type=int,
        choices=WIRE_BITS,
        help="Bits an element of the model's change; 16: bfloat16; 32: as it is, by the same route (plain averages).",
    )
    add("--topology", choices=TOPOLOGIES, default="ring", help="Network of decentralized (ring).")
    buffers = ("average", "broadcast", "leave")
    add(
        "--buffers",
        choices=buffers,
        default="average",
        help="What becomes of BatchNorm's statistics (average).",
    )
    add("--gamma", type=float, default=1.0, help="Proximal term of stagewise (1).")


def _by_task(name: str) -> str:
    """The defaults of an option that depend on the task, and a gpt's, for the help."""
    given = [f"{task}: {defaults[name]:g}" for task, defaults in {**BY_TASK, "gpt": OF_GPT}.items()]
    return ", ".join(given)


def _add_training(group: Any) -> None:
    add = group.add_argument
    add("--lr", type=float, help=f"Learning rate ({_by_task('lr')}).")
    add(
        "--lr-schedule",
        choices=SCHEDULES,
        default="cosine",
        help="Course of the rate after its warm-up (cosine).",
    )
    add("--optimizer", choices=OPTIMIZERS, help="Optimizer; muon takes AdamW for the rest (sgd; gpt: adamw).")
    add("--beta2", type=float, default=0.95, help="AdamW's decay of the second moment (0.95).")
    add("--lr-warmup", type=int, metavar="STEPS", help="Steps over which the rate rises (0; gpt: 50).")
    add("--lr-every", type=int, default=10, metavar="EPOCHS", help="Epochs between two drops of step (10).")
    add(
        "--lr-gamma",
        type=float,
        default=0.1,
        help="Factor of a drop of step, or of an epoch of exponential (0.1).",
    )
    add("--nesterov", action="store_true", help="Nesterov's form of the momentum.")
    add("--weight-decay", type=float, help="Weight decay; of SGD it is an L2 term (0; gpt: 0.1).")
    add("--steps", type=int, help="Steps of the whole run, in place of --epochs.")
    add("--epochs", type=int, help=f"Passes over the data ({_by_task('epochs')}).")
    add(
        "--batch-size",
        type=int,
        help=f"Examples, or columns of text, a rank and step ({_by_task('batch_size')}).",
    )
    add("--seed", type=int, default=0, help="Seed of weights and data (0).")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="Device (cpu).")


def _add_output(group: Any) -> None:
    add = group.add_argument
    # not --log: torchrun takes it for an abbreviation of its own options
    add("--log-file", dest="log", metavar="FILE", help="JSON lines (none).")
    add(
        "--log-every", type=int, default=10, metavar="STEPS", help="Steps between two writes to the log (10)."
    )
    add(
        "--delta-every",
        type=int,
        default=0,
        metavar="STEPS",
        help="Steps between two measurements of delta (0: none).",
    )
    add("--checkpoint", metavar="DIR", help="Folder of the checkpoints, one after each epoch (none).")
    add("--checkpoint-every", type=int, metavar="STEPS", help="Steps between two checkpoints (an epoch).")
    add(
        "--resume",
        action="store_true",
        help="Go on from the newest checkpoint in --checkpoint, if there is one.",
    )
    add("--stop-after", type=int, metavar="STEPS", help="Save and stop after so many steps (the whole run).")
    add("--sample", type=int, metavar="TOKENS", help="Length of the text that a gpt writes at the end (200).")
    add("--quiet", action="store_true", help="Show no progress.")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, with the defaults by task filled in; ends the process on a bad one, as argparse does."""
    p = parser()
    options = p.parse_args(arguments)
    given = _given(arguments)
    _fill(options)
    try:
        check(options)
        check_used(options, given)
    except ValueError as error:
        p.error(str(error))
    return options


def _fill(options: Any) -> None:
    """Sets the defaults that depend on task, model and averaging."""
    if options.task is None:
        options.task = "text" if options.model in LANGUAGE_MODELS else "digits"
    if options.scheme is None:
        options.scheme = "topk" if options.averaging == "none" else "dense"
    if options.period is None:
        options.period = 1 if options.averaging == "decentralized" else 8
    diloco = options.averaging == "diloco"
    if options.mu is None:
        options.mu = 0.9 if diloco else 0.7
    if options.outer_lr is None:
        options.outer_lr = 0.7 if diloco else 1.0
    if options.momentum is None:  # the two algorithms are about momentum
        options.momentum = 0.9 if options.averaging in ("restarted", "decentralized") else 0.0
    if options.momentum_in is None:
        options.momentum_in = "memory" if has_memory(options) else "optimizer"
    transformer = options.model in SIZES
    for name, value in {**PLAIN, **BY_TASK[options.task], **(OF_GPT if transformer else {})}.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if transformer and options.clip_norm is None and (options.error_feedback or not has_hook(options)):
        options.clip_norm = 1.0


def _given(arguments: Sequence[str] | None) -> set[str]:
    """The options that stand on the command line, by their name in the namespace."""
    p, absent = parser(), object()
    values = argparse.Namespace(**dict.fromkeys(vars(p.parse_args([])), absent))
    return {name for name, value in vars(p.parse_args(arguments, values)).items() if value is not absent}


def has_hook(options: Any) -> bool:
    """Whether gradients go through a sparse hook, throughout or at first."""
    reduces = options.averaging in ("none", "stagewise") or options.averaging_start > 0
    return bool(options.scheme != "dense" and reduces)


def has_memory(options: Any) -> bool:
    """Whether the memory of a sparse hook takes part in the whole training."""
    return has_hook(options) and options.error_feedback and options.averaging in ("none", "stagewise")


# An option: whether it has any effect, and what it needs, for the message. Dense takes --density and --warmup without an
# effect: studies give all schemes the same line.
USED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "data": (lambda o: o.task in ("cifar10", "ptb"), "--task cifar10 or ptb"),
    "hidden": (lambda o: o.model in ("mlp", "lstm"), "--model mlp or lstm"),
    "dropout": (lambda o: o.model in LANGUAGE_MODELS, "--model lstm or gpt"),
    "text_file": (lambda o: o.task == "text", "--task text"),
    "sample": (lambda o: o.model in SIZES, "--model gpt"),
    "epochs": (lambda o: o.steps is None, "no --steps, which takes its place"),
    "momentum": (lambda o: o.optimizer == "sgd", "--optimizer sgd"),
    "beta2": (lambda o: o.optimizer != "sgd", "--optimizer adamw or muon"),
    "window": (lambda o: o.task in ("text", "ptb"), "--task text or ptb"),
    "level": (lambda o: o.task == "text", "--task text"),
    "text_size": (lambda o: o.task == "text", "--task text"),
    "vocabulary": (lambda o: o.task == "text", "--task text"),
    "factor_masking": (
        lambda o: has_memory(o) and o.momentum > 0 and o.momentum_in == "memory",
        "a sparse hook with --momentum in its memory",
    ),
    "bits": (lambda o: o.scheme == "lowbit", "--scheme lowbit"),
    "rescale_with_lr": (has_memory, "a sparse hook with error feedback"),
    "momentum_in": (
        lambda o: o.momentum_in == "optimizer" or has_memory(o),
        "a sparse hook with error feedback",
    ),
    "warmup_start": (lambda o: o.warmup + o.warmup_steps > 0, "--warmup or --warmup-steps"),
    "error_feedback": (lambda o: o.scheme != "dense", "a sparse --scheme"),
    "dense_crossover": (lambda o: o.scheme != "dense", "a sparse --scheme"),
    "delta_every": (
        lambda o: has_hook(o) and o.averaging in ("none", "stagewise"),
        "a sparse hook throughout",
    ),
    "transport": (lambda o: o.scheme != "dense" or o.averaging != "none", "a sparse --scheme or --averaging"),
    "period": (lambda o: o.averaging not in ("none", "stagewise"), "an --averaging with a period"),
    "sync": (lambda o: o.averaging in ("local", "restarted"), "--averaging local or restarted"),
    "averaging_start": (lambda o: o.averaging in ("local", "restarted"), "--averaging local or restarted"),
    "mu": (
        lambda o: o.averaging in ("block", "slowmo", "diloco"),
        "--averaging block, slowmo or diloco",
    ),
    "outer_lr": (lambda o: o.averaging in ("slowmo", "diloco"), "--averaging slowmo or diloco"),
    "topology": (lambda o: o.averaging == "decentralized", "--averaging decentralized"),
    "buffers": (lambda o: o.averaging not in ("none", "stagewise"), "an --averaging of models"),
    "gamma": (lambda o: o.averaging == "stagewise", "--averaging stagewise"),
    "nesterov": (
        lambda o: o.momentum > 0,
        "--momentum",
    ),
    "lr_every": (lambda o: o.lr_schedule == "step", "--lr-schedule step"),
    "lr_gamma": (lambda o: o.lr_schedule in ("step", "exponential"), "--lr-schedule step or exponential"),
}


def check_used(options: Any, given: set[str]) -> None:
    """Refuses an option on the command line that the others leave without effect.

    Raises:
        ValueError: with the option's name and what it needs.
    """
    for name in sorted(given & set(USED)):
        applies, needs = USED[name]
        if not applies(options):
            positive = name not in ("error_feedback", "dense_crossover")
            shown = ("" if positive else "no-") + name.replace("_", "-")
            raise ValueError(f"--{shown} has no effect here: it needs {needs}")


def check(options: Any) -> None:
    """Refuses values that could not be meant.

    Raises:
        ValueError: with the option's name and value.
    """
    for name in ("density", "warmup_start", "lr_gamma"):
        if not 0.0 < getattr(options, name) <= 1.0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)} is outside (0, 1]")
    for name in ("momentum", "beta2", "dropout"):
        if not 0.0 <= getattr(options, name) < 1.0:
            raise ValueError(f"--{name} {getattr(options, name)} is outside [0, 1)")
    for name in POSITIVE:
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} {value} is not positive")
    for name in ("warmup", "warmup_steps", "delta_every", "weight_decay", "seed", "lr_warmup", "sample"):
        if getattr(options, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)} is negative")
    for name in ("resume", "checkpoint_every", "stop_after"):
        if getattr(options, name) and options.checkpoint is None:
            raise ValueError(f"--{name.replace('_', '-')} needs --checkpoint DIR")
    if options.factor_masking and (options.momentum == 0.0 or not options.error_feedback):
        raise ValueError(
            "--factor-masking masks the velocity of the memory: it needs --momentum and error feedback"
        )
    if options.warmup and options.warmup_steps:
        raise ValueError(
            f"--warmup {options.warmup} and --warmup-steps {options.warmup_steps}: give one of them"
        )
    if (options.warmup or options.warmup_steps) and options.warmup_start < options.density:
        raise ValueError(f"--warmup-start {options.warmup_start} is below --density {options.density}")
    check_averaging(options)
    if options.clip_norm is not None and has_hook(options) and not options.error_feedback:
        raise ValueError("--clip-norm clips before the memory: it needs error feedback")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here")


def fixed(options: Any) -> dict[str, Any]:
    """The options that a resumed run must share with the one it goes on from."""
    return {name: value for name, value in vars(options).items() if name not in FREE}
