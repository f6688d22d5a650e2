"""PR-SGD-Momentum (Yu, Jin, Yang): linear speed-up, how rarely to average on i.i.d. and other data."""

from __future__ import annotations

import math

from commhooks.averaging import Every, suggest_restart_period

from .claims import Budget, Claim, figure, slope, verdict
from .problems import DigitsMLP
from .simulate import Setup, by_class, run

PAPER = "PR-SGD-M"
BETA = 0.9
HOW = "Simulation; perceptron 64-24-10 with tanh on the digits, beta = 0.9"


def mean_squared_gradient(setup: Setup, points: int = 40) -> float:
    """The theorem's measure: the mean over steps and repeats of ||grad F(mean x_t)||^2."""
    every, values = max(1, setup.steps // points), []
    for state in run(setup):
        if state.step % every == 0 and state.step < setup.steps:
            values.append(float(setup.problem.full_gradient(state.mean).square().sum(dim=-1).mean()))
    return sum(values) / len(values)


def final(setup: Setup) -> tuple[float, float]:
    """Training loss and test accuracy of the averaged model at the end, means over repeats."""
    for state in run(setup):
        pass
    return float(setup.problem.value(state.mean).mean()), float(setup.problem.accuracy(state.mean).mean())


def speedup(budget: Budget) -> Claim:
    """The measure against P T, with gamma = c sqrt(P / T) and the allowed I."""
    sizes, totals = (1, 2, 4, 8), [budget.steps(t) for t in (512, 1024, 2048, 4096)]
    points = []
    with figure(budget, "pr_sgd_m_speedup") as axis:
        for workers in sizes:
            values = []
            for steps in totals:
                rate = 0.3 * math.sqrt(workers / steps)
                period = suggest_restart_period(steps, workers)
                values.append(
                    mean_squared_gradient(
                        Setup(
                            DigitsMLP(), workers, steps, lambda t, r=rate: r, repeats=budget.repeats(3),
                            momentum=BETA, sync=Every(period), average_momentum=True,
                        )
                    )
                )  # fmt: skip
                points.append((workers * steps, values[-1]))
            axis.loglog([workers * t for t in totals], values, marker="o", label=f"P = {workers}")
        axis.set(
            xlabel="P T",
            ylabel="mean squared gradient norm",
            title="gamma = 0.3 sqrt(P / T), I = sqrt(T / P^3)",
        )
    found = slope([p for p, _ in points], [v for _, v in points])
    spread = max(
        max(v for q, v in points if q == p) / min(v for q, v in points if q == p)
        for p in {p for p, _ in points}
    )
    return Claim(
        "pr_sgd_m_speedup",
        PAPER,
        "PR-SGD-Momentum converges at O(1 / sqrt(P T)) on non-convex problems: linear speed-up, with I = "
        "O(T^(1/2) / P^(3/2)) on i.i.d. data.",
        verdict(-0.75 < found < -0.4, spread < 1.5),
        f"Over P = 1 to {sizes[-1]} and T = {totals[0]} to {totals[-1]} the measure falls as (P T)^{found:.2f} (the "
        f"claim: -0.5); runs with the same P T differ by a factor of {spread:.2f} at most.",
        f"{HOW}; b = 1.",
    )


def constant_rate(budget: Budget) -> Claim:
    """The poster's first experiment: one constant rate, losses over epochs and over steps for P = 2, 4, 8."""
    sizes, steps = (1, 2, 4, 8), budget.steps(2400)
    at_end = {}
    with figure(budget, "pr_sgd_m_constant_rate") as axis:
        for workers in sizes:
            setup = Setup(
                DigitsMLP(), workers, steps, lambda t: 0.02, repeats=budget.repeats(3),
                momentum=BETA, sync=Every(4), average_momentum=True,
            )  # fmt: skip
            xs, ys = [], []
            for state in run(setup):
                if state.step % 60 == 0:
                    xs.append(state.step)
                    ys.append(float(setup.problem.value(state.mean).mean()))
            axis.semilogy(xs, ys, label=f"P = {workers}")
            at_end[workers] = sum(ys[-10:]) / len(ys[-10:])
        axis.set(
            xlabel="T (steps of each worker)",
            ylabel="training loss",
            title="constant rate 0.02, b = 1, I = 4",
        )
    order = list(at_end.values())
    return Claim(
        "pr_sgd_m_constant_rate",
        PAPER,
        "At a constant learning rate more workers reach a lower loss after the same number of steps (figure with "
        "P = 2, 4, 8).",
        verdict(order == sorted(order, reverse=True), order[-1] < order[0] / 1.5),
        "Losses at the end: " + ", ".join(f"{v:.4f} for P = {p}" for p, v in at_end.items()) + ".",
        f"{HOW}; the paper trains ResNet-56 on CIFAR-10.",
    )


def decaying_rate(budget: Budget) -> Claim:
    """The poster's second experiment: the same epochs for all P, decaying rate, final accuracy."""
    total = budget.steps(16 * 1437 // 4)
    results = {}
    with figure(budget, "pr_sgd_m_decaying_rate") as axis:
        for workers in (1, 2, 4, 8):
            steps = total // workers

            def rate(t: int, steps: int = steps, workers: int = workers) -> float:
                return 0.02 * workers**0.5 * (1.0 if t < steps // 2 else 0.1 if t < 3 * steps // 4 else 0.01)

            setup = Setup(
                DigitsMLP(), workers, steps, rate, batch=4, repeats=budget.repeats(4),
                momentum=BETA, sync=Every(4, total_steps=steps), average_momentum=True,
            )  # fmt: skip
            xs, ys = [], []
            for state in run(setup):
                if state.step % max(1, steps // 30) == 0 or state.step == steps:
                    xs.append(state.step * workers * 4 / 1437)
                    ys.append(float(setup.problem.accuracy(state.mean).mean()))
            axis.semilogy(xs, [1 - y for y in ys], label=f"P = {workers}")
            results[workers] = ys[-1]
        axis.set(
            xlabel="epochs of all workers together",
            ylabel="test error",
            ylim=(0.02, 0.1),
            title="decaying rate, b = 4, I = 4; errors above 0.1 cut off",
        )
    worst = results[1] - min(results.values())
    return Claim(
        "pr_sgd_m_decaying_rate",
        PAPER,
        "With a decaying rate the workers together need the epochs of one worker for its accuracy, so P workers need "
        "1/P of the steps.",
        verdict(worst < 0.01),
        "Test accuracies after 16 epochs: "
        + ", ".join(f"{v:.1%} for P = {p}" for p, v in results.items())
        + ".",
        f"{HOW}; rate proportional to sqrt(P), divided by ten twice.",
    )


def period_and_data(budget: Budget) -> Claim:
    """Final loss over I for i.i.d. data and for data sorted by class; with and without averaging momentum."""
    workers, steps = 4, budget.steps(2048)
    periods = (1, 2, 4, 8, 16, 32, 64, 128)
    problem = DigitsMLP()
    curves: dict[str, list[float]] = {}
    for name, shards, momentum_too in (
        ("i.i.d.", None, True),
        ("sorted by class", by_class(problem.labels, workers), True),
        ("sorted, momentum not averaged", by_class(problem.labels, workers), False),
    ):
        curves[name] = [
            final(
                Setup(
                    problem, workers, steps, lambda t: 0.02, batch=4, repeats=budget.repeats(2), momentum=BETA,
                    sync=Every(period, total_steps=steps), average_momentum=momentum_too, shards=shards,
                )
            )[0]
            for period in periods
        ]  # fmt: skip
    with figure(budget, "pr_sgd_m_period") as axis:
        for name, values in curves.items():
            axis.semilogy(periods, values, marker="o", label=name)
        for iid in (True, False):
            line = suggest_restart_period(steps, workers, iid=iid)
            axis.axvline(
                line, ls=":" if iid else "--", color="gray", label=f"formula, {'' if iid else 'not '}i.i.d."
            )
        axis.set_xscale("log", base=2)
        axis.set(
            xlabel="steps between averagings I",
            ylabel="training loss",
            title=f"P = {workers}, T = {steps}, b = 4",
        )
    limits = {}
    for name, values in curves.items():
        limits[name] = max(p for p, v in zip(periods, values, strict=True) if v <= 1.25 * values[0])
    alone, both = curves["sorted, momentum not averaged"], curves["sorted by class"]
    gain, at = max((a / b, period) for a, b, period in zip(alone, both, periods, strict=True))
    return Claim(
        "pr_sgd_m_period",
        PAPER,
        "I may be O(T^(1/2) / P^(3/2)) on i.i.d. data and must be smaller, O(T^(1/4) / P^(3/4)), when workers have "
        "data of their own.",
        verdict(
            limits["i.i.d."] >= suggest_restart_period(steps, workers),
            limits["sorted by class"] < limits["i.i.d."],
        ),
        f"The final loss stays within 25 % of I = 1 up to I = {limits['i.i.d.']} on i.i.d. data and up to I = "
        f"{limits['sorted by class']} on data sorted by class (the formulas with constant 1 say "
        f"{suggest_restart_period(steps, workers)} and {suggest_restart_period(steps, workers, iid=False)}). Averaging "
        f"parameters alone, momentum not, gives at most {gain:.2f} times the loss on the sorted data, at I = {at}.",
        f"{HOW}; rate 0.02.",
    )


CLAIMS = (speedup, constant_rate, decaying_rate, period_and_data)
