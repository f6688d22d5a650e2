"""A study of training runs that is interrupted after its third run and started again."""

import pytest
import torch
from launch import spawn_gloo
from studies import trained
from training import launch as job_launch


def run_twice(study, n, timeout):
    """Runs `study(world)` on `n` forked ranks, which is interrupted once.

    Returns:
        Rank 0's records, the commands of train.py that it ran, and the records of the last rank.
    """

    def ranks(rank, size):
        world = job_launch.World(rank, size, "torchrun", torch.device("cpu"))
        train, ran = trained.train, []

        def stops(world, command, *more):
            if len(ran) == 3:
                raise KeyboardInterrupt
            ran.append(command)
            return train(world, command, *more)

        trained.train = stops
        with pytest.raises(KeyboardInterrupt):
            study(world)
        trained.train = lambda world, command, *more: ran.append(command) or train(world, command, *more)
        return study(world), ran

    results = spawn_gloo(ranks, n, timeout=timeout)
    (found, ran), (other, _) = results[0], results[-1]
    return found, ran, other
