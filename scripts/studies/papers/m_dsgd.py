"""M-DSGD (Zhao, Gao, Li): sparsified momentum SGD converges like the dense one; the memory stays bounded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from benchmarks.harness.figure import color

from commhooks.averaging import ConvexLR, LastHalf, NonConvexLR, StronglyConvexLR

from .claims import Budget, Claim, figure, slope, verdict
from .problems import DigitsMLP, LeastAbsolute, Logistic, Problem
from .simulate import SparseSetup, run_sparse

PAPER = "M-DSGD"
BETA = 0.5
SCHEMES = ((None, "topk", "dense"), (4, "topk", "top-k"), (4, "randomk", "random-k"))


def rates(scheduler: Callable[[torch.optim.Optimizer], object]) -> Callable[[int], float]:
    """The rate function of one of the library's schedulers."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    return scheduler(optimizer).rate  # type: ignore[attr-defined]


def errors_of(setup: SparseSetup, at: list[int], measure: str) -> list[float]:
    """Errors after the steps ``at``: of the last-half average, of the best-known average, or mean squared gradients."""
    sums: dict[int, object] = {t: 0.0 for t in at}
    total = dict.fromkeys(at, 0.0)
    problem, best, running, every = setup.problem, [], 0.0, max(1, setup.steps // 256)
    for step, w, _, _ in run_sparse(setup):
        if measure == "last half":
            for t in at:
                if step < t and LastHalf(t)(step):
                    sums[t] = sums[t] + w
                    total[t] += 1
        elif measure == "mean iterate":
            running = running + (w - running) / (step + 1)
            if step in at:
                best.append(float(problem.value(running).mean() - problem.minimum))
        else:
            if step % every == 0:
                sums[step] = float(problem.full_gradient(w).square().sum(dim=-1).mean())
    if measure == "last half":
        return [float(problem.value(sums[t] / total[t]).mean() - problem.minimum) for t in at]
    if measure == "mean iterate":
        return best
    taken = [t for t in range(0, setup.steps, every)]
    return [sum(sums[t] for t in taken) / len(taken)]


def panel(
    budget: Budget, axis: object, problem: Problem, scheduler: Callable[..., object], totals: list[int], measure: str,
    title: str,
) -> dict[str, list[float]]:  # fmt: skip
    """One set of curves, dense, top-k and random-k, against T."""
    curves = {}
    for keep, mask, name in SCHEMES:
        keep = keep if keep is None or problem.numel < 100 else problem.numel // 50
        base = SparseSetup(problem, 4, totals[-1], lambda t: 0.0, keep, mask, BETA, 2, budget.repeats(4))
        if measure == "squared gradient":  # its constant rate depends on T
            curves[name] = [
                errors_of(replace(base, steps=t, rate=rates(lambda o, t=t: scheduler(o, t))), [t], measure)[0]
                for t in totals
            ]
        else:
            curves[name] = errors_of(replace(base, rate=rates(scheduler)), totals, measure)
        drawn = color(name.replace("-", ""))
        axis.loglog(totals, curves[name], color=drawn, marker="o", label=name)  # type: ignore[attr-defined]
    axis.set(xlabel="steps T", title=title)  # type: ignore[attr-defined]
    return curves


def convergence(budget: Budget) -> Claim:
    """Theorems 8, 9 and 10 with their learning rates."""
    totals = [budget.steps(t) for t in (256, 512, 1024, 2048, 4096)]
    strongly, convex = Logistic(0.05), LeastAbsolute()
    with figure(budget, "m_dsgd_convergence", 3) as axes:
        a = panel(budget, axes[0], strongly, lambda o: StronglyConvexLR(o, 0.05, BETA), totals, "last half",
                  "strongly convex (Theorem 8)")  # fmt: skip
        b = panel(
            budget, axes[1], convex, lambda o: ConvexLR(o, BETA), totals, "mean iterate", "convex (Theorem 9)"
        )
        c = panel(budget, axes[2], DigitsMLP(), lambda o, t: NonConvexLR(o, t, scale=4.0), totals, "squared gradient",
                  "non-convex (Theorem 10)")  # fmt: skip
        for axis, label in zip(
            axes, ("F(average) - F*", "F(average) - F*", "mean squared gradient"), strict=True
        ):
            axis.set(ylabel=label)
    found = {name: [slope(totals[1:], curve[name][1:]) for curve in (a, b, c)] for name in a}
    ratio = [max(curve["top-k"][-1], 1e-12) / curve["dense"][-1] for curve in (a, b, c)]
    return Claim(
        "m_dsgd_convergence",
        PAPER,
        "M-DSGD with momentum converges at O(1/T) on strongly convex, O(log T / sqrt T) on convex and O(1/sqrt T) on "
        "non-convex problems (Theorems 8 to 10), as dense DSGD does.",
        verdict(found["top-k"][0] < -0.8, found["top-k"][1] < -0.4, found["top-k"][2] < -0.4),
        "Slopes of top-k against T: " + ", ".join(f"{s:.2f}" for s in found["top-k"]) + " (the rates: -1, -0.5, -0.5); "
        "dense: " + ", ".join(f"{s:.2f}" for s in found["dense"]) + "; random-k: "
        + ", ".join(f"{s:.2f}" for s in found["random-k"]) + ". At the largest T top-k's error is "
        + ", ".join(f"{r:.2f}" for r in ratio) + " times the dense one.",
        "Simulation; P = 4, b = 2, beta = 0.5, the library's schedulers; logistic regression on breast cancer with L2 "
        "(4 of 31 elements sent), least absolute deviations (4 of 20), perceptron on the digits (2 %).",
    )  # fmt: skip


def memory_is_bounded(budget: Budget) -> Claim:
    """E ||mean u||^2 against Lemma 13's bound, over the density and over P."""
    problem, steps, keeps = Logistic(0.05), budget.steps(600), (1, 2, 4, 8, 16)
    rows: dict[str, list[float]] = {"top-k": [], "random-k": [], "bound": []}
    by_workers: dict[int, float] = {}

    def norms(keep: int, mask: str, workers: int) -> tuple[float, float]:
        setup = SparseSetup(
            problem, workers, steps, lambda t: 0.05, keep, mask, BETA, repeats=budget.repeats(8), batch=1
        )
        worst, second = 0.0, 0.0
        for step, _, u, g in run_sparse(setup):
            if step:
                worst = max(worst, float(u.mean(dim=1).square().sum(dim=-1).mean()))
                second = max(second, float(g.square().sum(dim=-1).mean()))
        return worst, second

    for keep in keeps:
        top, g2 = norms(keep, "topk", 4)
        random, g2r = norms(keep, "randomk", 4)
        d, g_squared = problem.numel, max(g2, g2r)
        rows["top-k"].append(top)
        rows["random-k"].append(random)
        rows["bound"].append(2 * (d - keep) * (2 * d + keep) * g_squared / ((1 - BETA) ** 2 * keep**2))
    for workers in (1, 4, 16):
        by_workers[workers] = norms(4, "topk", workers)[0]
    with figure(budget, "m_dsgd_memory") as axis:
        for name, values in rows.items():
            axis.loglog(keeps, values, marker="o", ls=":" if name == "bound" else "-", label=name)
        axis.set(
            xlabel="elements sent of 31", ylabel="max over t of E ||mean u||^2", title="P = 4, beta = 0.5"
        )
    below = all(v <= b for n in ("top-k", "random-k") for v, b in zip(rows[n], rows["bound"], strict=True))
    smaller = all(t <= r for t, r in zip(rows["top-k"], rows["random-k"], strict=True))
    share = max(t / b for t, b in zip(rows["top-k"], rows["bound"], strict=True))
    return Claim(
        "m_dsgd_memory",
        PAPER,
        "The memory stays bounded, by 2 (d - q)(2 d + q) G^2 / ((1 - beta)^2 q^2), whatever the number of workers; "
        "top-k keeps it smallest (Lemma 13 and below).",
        verdict(below, smaller, by_workers[16] <= 1.5 * by_workers[1]),
        f"Measured norms lie below the bound at every density (top-k reaches {share:.1%} of it at most), top-k's below "
        f"random-k's {'everywhere' if smaller else 'not everywhere'}; with 4 elements sent they are "
        + ", ".join(f"{v:.3g} at P = {p}" for p, v in by_workers.items()) + ".",
        "Simulation; logistic regression on breast cancer, b = 1, constant rate, G^2 the largest measured.",
    )  # fmt: skip


def variants(budget: Budget) -> Claim:
    """Learning rate in the memory, and momentum factor masking, against the plain form."""
    problem, steps = DigitsMLP(), budget.steps(1600)
    keep, beta = problem.numel // 100, 0.9

    def rate(t: int) -> float:
        return 0.05 * (1.0 if t < steps // 2 else 0.1 if t < 3 * steps // 4 else 0.01)

    losses, accuracies = {}, {}
    kinds = {
        "dense": {"keep": None},
        "plain memory": {},
        "rate in the memory": {"rescale": True},
        "factor masking": {"factor_masking": True},
    }
    with figure(budget, "m_dsgd_variants") as axis:
        for name, options in kinds.items():
            setup = SparseSetup(
                problem,
                4,
                steps,
                rate,
                **{"keep": keep, **options},
                momentum=beta,
                batch=8,
                repeats=budget.repeats(4),
            )
            xs, ys = [], []
            for step, w, _, _ in run_sparse(setup):
                if step % max(1, steps // 40) == 0:
                    xs.append(step)
                    ys.append(float(problem.value(w).mean()))
            axis.semilogy(xs, ys, label=name)
            losses[name], accuracies[name] = ys[-1], float(problem.accuracy(w).mean())
        axis.set(xlabel="T", ylabel="training loss", title=f"{keep} of {problem.numel} sent, beta = {beta}")
    gap = abs(accuracies["factor masking"] - accuracies["plain memory"])
    return Claim(
        "m_dsgd_variants",
        PAPER,
        "The learning rate need not be kept in the memory (eq. 3 and 4), and momentum factor masking changes the "
        "accuracy by less than 1 % (section 3.1, after Lin et al.).",
        verdict(losses["plain memory"] <= 1.05 * losses["rate in the memory"], gap < 0.01),
        "Final losses: " + ", ".join(f"{v:.4f} ({n})" for n, v in losses.items()) + "; test accuracies "
        + ", ".join(f"{v:.1%}" for v in accuracies.values()) + " in the same order.",
        "Simulation; perceptron 64-24-10 on the digits, P = 4, b = 8, rate divided by ten twice, 1 % sent.",
    )  # fmt: skip


CLAIMS = (convergence, memory_is_bounded, variants)
