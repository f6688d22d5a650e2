"""The jobs of train.py under Horovod: the same tasks, options, log and checkpoints, another way to exchange gradients.

horovodrun -np 4 --gloo python scripts/train_horovod.py --scheme topk --density 0.01
horovodrun -np 4 --mpi  python scripts/train_horovod.py --scheme gtopk
mpirun -np 4 python -m mpi4py scripts/train_horovod.py --scheme randomk --stock

Options are train.py's (see its --help), and:
  --stock   Horovod's own DistributedOptimizer with commhooks.horovod.Compression (topk and randomk), not ours
Dense is Horovod's own optimizer without compression. The launcher chooses the transport; --bucket-mb sizes our buckets.
"""

from __future__ import annotations

import sys
import time

import torch
from train import render
from training import horovod, launch, loop, options


def main() -> None:
    """Reads the command line, trains, prints the summary on rank 0."""
    arguments = sys.argv[1:]
    if "-h" in arguments or "--help" in arguments:
        print(__doc__)
        return
    stock = "--stock" in arguments
    chosen = options.parse([argument for argument in arguments if argument != "--stock"])
    if getattr(chosen, "averaging", "none") != "none":
        sys.exit("train_horovod.py: error: --averaging is train.py's: periodic averaging needs no Horovod")
    torch.set_num_threads(1)
    with horovod.session(chosen.device, timeout_s=max(120.0, 2 * chosen.timeout)) as world:
        horovod.use_horovod(stock)
        try:
            run = loop.Run(chosen, world)
        except ValueError as error:
            if not world.is_main:
                time.sleep(1.0)
            print(f"train_horovod.py: error: {error}", file=sys.stderr, flush=True)
            raise SystemExit(2) from error
        summary = run.train()
        if world.is_main:
            print(render(summary), flush=True)
    launch.leave()


if __name__ == "__main__":
    main()
