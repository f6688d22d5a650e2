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
from .m_avg import SWEEP_SAMPLES, sweep_setup
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
        optimizer = torch.optim.SGD([x], setup.rate(0), setup.momentum, nesterov=setup.nesterov)
        averager = {
            "local SGD": lambda: LocalSGD(setup.sync, transport=transport),
            "M-AVG": lambda: BlockMomentum(
                setup.block_momentum, setup.sync.period, params=[x], transport=transport
            ),
            "PR-SGD-M": lambda: RestartedMomentum(optimizer, setup.sync, transport=transport),
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

    return torch.stack(in_process.run(setup.workers, work, timeout_s=120.0))


def difference(kind: str, setup: Setup) -> float:
    """Largest difference of any worker's parameters at the end."""
    for state in run(setup):
        pass
    return float((by_library(kind, setup) - state.x[0]).abs().max())


def simulation_is_the_library(budget: Budget) -> Claim:
    """Largest difference of any worker's parameters after a run, per algorithm and P."""
    problem, steps, sizes = DigitsMLP(), budget.steps(64), (1, 2, 4) if budget.quick else (1, 2, 4, 48)
    differences: dict[str, list[float]] = {}
    for kind in KINDS:
        differences[kind] = []
        for workers in sizes:
            setup = setup_of(kind, problem, workers, min(steps, 16) if workers > 4 else steps)
            differences[kind].append(difference(kind, setup))
    sweep = sweep_setup(problem, sizes[-1], 0.9, budget.steps(SWEEP_SAMPLES))
    sweep_gap = difference("M-AVG", sweep)
    with figure(budget, "simulation_check") as axis:
        for kind, values in differences.items():
            axis.semilogy(sizes, [v + 1e-18 for v in values], marker="o", label=kind)
        axis.semilogy(sweep.workers, sweep_gap, marker="*", ls="", label=f"M-AVG, {sweep.steps} steps")
        axis.set_xscale("log", base=2)
        axis.set(
            xlabel="workers P",
            ylabel="largest difference (0 is drawn as 1e-18)",
            title=f"simulation and library after {steps} steps (P above 4: {min(steps, 16)})",
        )
    worst = max(sweep_gap, *(v for values in differences.values() for v in values))
    return Claim(
        "simulation_check",
        "",
        "The simulation of this page computes what the library computes.",
        verdict(worst < 1e-9),
        f"After {steps} steps (16 at P = 48) on the same samples no parameter of any worker differs by more than "
        f"{max(v for values in differences.values() for v in values):.1e} (float64), and by {sweep_gap:.1e} after the "
        f"{sweep.steps} steps of m_avg_momentum_and_workers at P = {sweep.workers}, mu = 0.9, run in full by both.",
        "Perceptron on the digits, P = 1, 2, 4 and 48, four algorithms, one thread per rank. Of the sweeps that point "
        "only is run by the library; all others are the simulation's.",
    )


CLAIMS = (simulation_is_the_library,)
