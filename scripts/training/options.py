"""The command line of train.py; every option has a default, several by task."""

from __future__ import annotations

import argparse
from typing import Any, Sequence

from .averaging import AVERAGING_HELP, KINDS, START_HELP, SYNC_HELP, TOPOLOGIES
from .averaging import check as check_averaging
from .data_text import LEVELS
from .strategies import SCHEMES
from .tasks import MODELS, TASKS

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

DESCRIPTION = """Data-parallel training with a sparse gradient exchange.

  torchrun --standalone --nproc-per-node 4 scripts/train.py --scheme topk --density 0.01
  mpiexec -n 4 python -m mpi4py scripts/train.py --scheme gtopk --transport mpi
"""


def parser() -> argparse.ArgumentParser:
    """All options, in groups."""
    p = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("what is trained")
    g.add_argument(
        "--task", choices=TASKS, default="digits", help="data set (default: digits, needs no download)"
    )
    g.add_argument(
        "--data", metavar="DIR", help="local folder for cifar10 (python version) and ptb (ptb.*.txt)"
    )
    g.add_argument("--model", choices=MODELS, help="default: resnet20 for images, lstm for text")
    g.add_argument("--hidden", type=int, default=128, help="hidden units of mlp and lstm (128)")
    g.add_argument("--dropout", type=float, default=0.2, help="of the lstm (0.2)")
    g.add_argument("--window", type=int, default=35, help="tokens of a window of text (35)")
    g.add_argument("--level", choices=LEVELS, default="char", help="tokens of --task text")
    g.add_argument("--text-size", type=int, default=400_000, help="characters read for --task text (400,000)")
    g.add_argument("--vocabulary", type=int, default=2000, help="most tokens kept for --task text (2000)")
    g = p.add_argument_group("how gradients travel")
    g.add_argument("--scheme", choices=SCHEMES, help="default: topk; dense under --averaging")
    g.add_argument("--density", type=float, default=0.01, help="share of the gradient that is sent (0.01)")
    g.add_argument("--transport", choices=("distributed", "mpi"), default="distributed")
    g.add_argument(
        "--momentum", type=float, default=0.0, help="in the memory; in the optimizer where there is none"
    )
    g.add_argument("--factor-masking", action="store_true", help="zero the velocity where a value was sent")
    g.add_argument(
        "--warmup", type=int, default=0, metavar="EPOCHS", help="density falls from 0.25 over so many epochs"
    )
    g.add_argument("--clip-norm", type=float, help="clip the local gradient per bucket, before the memory")
    g.add_argument(
        "--no-error-feedback", dest="error_feedback", action="store_false", help="drop what is not sent"
    )
    g.add_argument("--no-dense-crossover", dest="dense_crossover", action="store_false")
    g.add_argument("--bucket-mb", type=float, default=25.0, help="DDP's bucket_cap_mb (25)")
    g.add_argument(
        "--timeout", type=float, default=60.0, help="seconds until a missing rank is an error (60)"
    )
    g = p.add_argument_group("how rarely models are averaged instead")
    g.add_argument("--averaging", choices=("none", *KINDS), default="none", help=AVERAGING_HELP)
    g.add_argument("--period", type=int, help="local steps between averagings (8; decentralized: 1)")
    g.add_argument("--sync", default="every", metavar="SET", help=SYNC_HELP)
    g.add_argument("--averaging-start", type=int, default=0, metavar="STEPS", help=START_HELP)
    g.add_argument("--mu", type=float, default=0.7, help="block momentum; 0 is K-AVG (0.7)")
    g.add_argument("--nesterov", action="store_true", help="option II of PR-SGD-Momentum; needs --momentum")
    g.add_argument("--topology", choices=TOPOLOGIES, default="ring", help="of decentralized (ring)")
    g.add_argument(
        "--buffers", choices=("average", "broadcast", "leave"), default="average", help="BatchNorm's"
    )
    g.add_argument("--gamma", type=float, default=1.0, help="proximal term of stagewise (1)")
    g = p.add_argument_group("how it is trained")
    g.add_argument("--lr", type=float)
    g.add_argument("--lr-schedule", choices=("constant", "cosine"), default="cosine")
    g.add_argument("--weight-decay", type=float, default=0.0)
    g.add_argument("--epochs", type=int)
    g.add_argument("--batch-size", type=int, help="per rank")
    g.add_argument("--seed", type=int, default=0)
    g.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    g = p.add_argument_group("what is written")
    # torchrun takes a bare --log after the script for an abbreviation of its own options
    g.add_argument(
        "--log-file", "--log", dest="log", metavar="FILE", help="JSON lines (under torchrun: --log-file)"
    )
    g.add_argument(
        "--log-every",
        type=int,
        default=10,
        help="steps between writes to the log (10); each step has its line",
    )
    g.add_argument(
        "--delta-every",
        type=int,
        default=0,
        help="measure Assumption 1's delta every so many steps (0: never)",
    )
    g.add_argument("--checkpoint", metavar="DIR", help="checkpoint after each epoch")
    g.add_argument(
        "--checkpoint-every", type=int, metavar="STEPS", help="checkpoint every so many steps instead"
    )
    g.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint in --checkpoint, if there is one",
    )
    g.add_argument(
        "--stop-after",
        type=int,
        metavar="STEPS",
        help="checkpoint and stop when so many steps have been done",
    )
    g.add_argument("--quiet", action="store_true", help="no progress display")
    return p


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, with the task's defaults filled in; ends the process on a bad one, as argparse does."""
    p = parser()
    options = p.parse_args(arguments)
    for name, value in BY_TASK[options.task].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.scheme is None:
        options.scheme = "topk" if options.averaging == "none" else "dense"
    if options.period is None:
        options.period = 1 if options.averaging == "decentralized" else 8
    try:
        check(options)
    except ValueError as error:
        p.error(str(error))
    return options


def check(options: Any) -> None:
    """Refuses values that could not be meant.

    Raises:
        ValueError: with the option's name and value.
    """
    if not 0.0 < options.density <= 1.0:
        raise ValueError(f"--density {options.density} is outside (0, 1]")
    if not 0.0 <= options.momentum < 1.0:
        raise ValueError(f"--momentum {options.momentum} is outside [0, 1)")
    for name in (
        "hidden",
        "window",
        "text_size",
        "epochs",
        "batch_size",
        "log_every",
        "lr",
        "timeout",
        "bucket_mb",
    ):
        if not getattr(options, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)} is not positive")
    for name in ("warmup", "delta_every", "weight_decay", "seed"):
        if getattr(options, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)} is negative")
    for name in ("checkpoint_every", "stop_after"):
        if getattr(options, name) is not None and getattr(options, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)} is not positive")
    for name in ("resume", "checkpoint_every", "stop_after"):
        if getattr(options, name) and options.checkpoint is None:
            raise ValueError(f"--{name.replace('_', '-')} needs --checkpoint DIR")
    if options.factor_masking and (options.momentum == 0.0 or not options.error_feedback):
        raise ValueError(
            "--factor-masking masks the velocity of the memory: it needs --momentum and error feedback"
        )
    check_averaging(options)
    if options.clip_norm is not None and not options.error_feedback:
        raise ValueError("--clip-norm clips before the memory: it needs error feedback")


def fixed(options: Any) -> dict[str, Any]:
    """The options that a resumed run must share with the one it goes on from."""
    return {name: value for name, value in vars(options).items() if name not in FREE}
