"""Data-parallel training of a chosen model with a chosen gradient exchange, started by torchrun or mpiexec.

torchrun --standalone --nproc-per-node 4 scripts/train.py --scheme topk --density 0.01
mpiexec -n 4 python -m mpi4py scripts/train.py --scheme gtopk --transport mpi --log-file run.jsonl
"""

from __future__ import annotations

import sys
import time
from typing import Any


def main() -> None:
    """Reads the command line, joins the job, trains, prints the summary on rank 0."""
    import torch
    from training import launch, loop, options

    chosen = options.parse()
    torch.set_num_threads(1)  # ranks share the machine
    if chosen.transport == "mpi" and chosen.scheme != "dense" and launch.launcher() == "torchrun":
        sys.exit("train.py: error: --transport mpi needs a job started by mpiexec, not by torchrun")
    with launch.session(chosen.device, timeout_s=max(120.0, 2 * chosen.timeout)) as world:
        try:
            run = loop.Run(chosen, world)
        except ValueError as error:
            refuse(world, error)
        summary = run.train()
        if world.is_main:
            print(render(summary), flush=True)
    launch.leave()


def refuse(world: Any, error: ValueError) -> None:
    """One line for what the user can mend; rank 0 first, the others only if rank 0 has nothing to say."""
    if not world.is_main:
        time.sleep(1.0)
    print(f"train.py: error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def render(summary: dict[str, Any]) -> str:
    """The summary as a table of two columns."""
    from training.log import count, table

    rows = [
        ("scheme", summary["scheme"]),
        ("error feedback", "yes" if summary["error_feedback"] else "no"),
        ("ranks", summary["ranks"]),
        ("steps", summary["step"]),
        ("bytes sent a step and rank", count(summary["bytes_sent_per_step"])),
        ("bytes of the gradient", count(summary["gradient_bytes"])),
        ("step time", f"{summary['step_time_s'] * 1000:.1f} ms"),
    ]
    if "test_loss" in summary:
        rows.insert(4, ("test loss", f"{summary['test_loss']:.4f}"))
        rows.insert(5, ("test accuracy", f"{summary['test_accuracy']:.2%}"))
    if "test_perplexity" in summary:
        rows.insert(6, ("test perplexity", f"{summary['test_perplexity']:.3f}"))
    if summary["averaging"] != "none":
        rows.insert(1, ("averaging", summary["averaging"]))
    written = f"\n\n{summary['sample']}" if "sample" in summary else ""
    return table(("", "value"), rows) + written


if __name__ == "__main__":
    main()
