"""The simulation against the library, sample for sample, at P = 1, 2, 4 and 48."""

from __future__ import annotations

import torch
from torch import Tensor

from commhooks.averaging import (
    BlockMomentum,
    DecentralizedMomentum,
    Every,
    LocalSGD,
    RestartedMomentum,
    topology,
)
from commhooks.transports import in_process

from .claims import Budget, Claim, figure, verdict
from .problems import DigitsMLP
from .simulate import Setup, rows_of, run

KINDS = ("local SGD", "M-AVG", "PR-SGD-M", "decentralized")


def setup_of(kind: str, problem: DigitsMLP, workers: int, steps: int) -> Setup:
    """The simulation's form of each algorithm."""
    base = Setup(problem, workers, steps, lambda t: 0.1, batch=4)
    if kind == "M-AVG":
        base.sync, base.block_momentum = Every(4), 0.7
    elif kind == "local SGD":
        base.sync = Every(4)
    else:
        base.momentum, base.nesterov = 0.9, kind == "decentralized"
        if kind == "PR-SGD-M":
            base.sync, base.average_momentum = Every(4), True
        else:
            base.mixing = topology.ring(workers).matrices
    return base


def by_library(kind: str, setup: Setup) -> Tensor:
    """Final points (P, n) of the library on the same samples."""
    draw = rows_of(setup)
    rows = [next(draw) for _ in range(setup.steps)]

    def work(transport: in_process.InProcessTransport) -> Tensor:
        x = torch.nn.Parameter(setup.problem.start(setup.seed).clone())
        optimizer = torch.optim.SGD([x], lr=0.1, momentum=setup.momentum, nesterov=setup.nesterov)
        averager = {
            "local SGD": lambda: LocalSGD(4, transport=transport),
            "M-AVG": lambda: BlockMomentum(0.7, 4, params=[x], transport=transport),
            "PR-SGD-M": lambda: RestartedMomentum(optimizer, 4, transport=transport),
            "decentralized": lambda: DecentralizedMomentum(
                optimizer, topology.ring(setup.workers), transport=transport
            ),
        }[kind]()
        for step in rows:
            mine = step[:, transport.rank : transport.rank + 1]
            x.grad = setup.problem.gradient(x.detach()[None, None], mine)[0, 0]
            optimizer.step()
            averager.average_parameters([x])
        return x.detach()

    return torch.stack(in_process.run(setup.workers, work))


def simulation_is_the_library(budget: Budget) -> Claim:
    """Largest difference of any worker's parameters after a run, per algorithm and P."""
    problem, steps, sizes = DigitsMLP(), budget.steps(64), (1, 2, 4) if budget.quick else (1, 2, 4, 48)
    differences: dict[str, list[float]] = {}
    for kind in KINDS:
        differences[kind] = []
        for workers in sizes:
            setup = setup_of(kind, problem, workers, min(steps, 16) if workers > 4 else steps)
            for state in run(setup):
                pass
            gap = (by_library(kind, setup) - state.x[0]).abs().max()
            differences[kind].append(float(gap))
    with figure(budget, "simulation_check") as axis:
        for kind, values in differences.items():
            axis.semilogy(sizes, [v + 1e-18 for v in values], marker="o", label=kind)
        axis.set(xlabel="P", ylabel="largest difference", title=f"simulation and library after {steps} steps")
    worst = max(v for values in differences.values() for v in values)
    return Claim(
        "simulation_check",
        "",
        "The simulation of this page computes what the library computes.",
        verdict(worst < 1e-9),
        f"After {steps} steps (16 at P = 48) on the same samples no parameter of any worker differs by more than {worst:.1e} (float64).",
        "Perceptron on the digits, P = 1, 2, 4 and 48, four algorithms, one thread per rank.",
    )


CLAIMS = (simulation_is_the_library,)
