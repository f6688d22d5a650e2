"""Local SGD (Stich): linear speed-up, mini-batches, how rarely one may communicate."""

from __future__ import annotations

from commhooks.averaging import AtSteps, Every, Growing, Quadratic, SyncSet, suggest_period, suggest_shift

from .claims import Budget, Claim, figure, slope, verdict
from .problems import Logistic, Problem
from .problems import Quadratic as QuadraticProblem
from .simulate import Setup, run

PAPER = "Local SGD"


def output_errors(problem: Problem, setup: Setup, shift: float, at: list[int]) -> dict[int, float]:
    """Error of the weighted output average after the steps ``at``, mean over repeats."""
    weights, total, mean, errors = Quadratic(shift), 0.0, 0.0, {}
    for state in run(setup):
        if state.step in at:
            errors[state.step] = float((problem.value(mean) - problem.minimum).mean())
        if state.step < setup.steps:  # the sums hold t = 0 .. T - 1
            weight = weights(state.step)
            total += weight
            mean = mean + (state.mean - mean) * (weight / total)
    return errors


def theorem(problem: Problem, period: int, **options: object) -> tuple[Setup, float]:
    """A run with Theorem 2.2's step sizes (with the proof's shift)."""
    shift = suggest_shift(problem.smoothness / problem.strong_convexity, period)
    rate = lambda t: 4.0 / (problem.strong_convexity * (shift + t))  # noqa: E731
    return Setup(problem, rate=rate, sync=Every(period, total_steps=options["steps"]), **options), shift


def powers(first: int, last: int) -> list[int]:
    """Powers of two from first to last."""
    return [1 << e for e in range(first.bit_length() - 1, last.bit_length())]


def speedup_in_workers(budget: Budget) -> Claim:
    """Error against T for several P, and against P T."""
    steps, sizes = budget.steps(8192), (1, 2, 4, 8, 16, 32)
    at = powers(max(8, steps // 64), steps)
    slopes = []
    with figure(budget, "local_sgd_speedup_workers", 2) as axes:
        for axis, problem in zip(axes, (QuadraticProblem(sigma=3.0), Logistic(0.05)), strict=True):
            name = type(problem).__name__
            finals = []
            for workers in sizes:
                setup, shift = theorem(problem, 8, workers=workers, steps=steps, repeats=budget.repeats(8))
                errors = output_errors(problem, setup, shift, at)
                axis.loglog(
                    [workers * t for t in errors], list(errors.values()), marker=".", label=f"P = {workers}"
                )
                finals.append(errors[at[-1]])
            slopes.append(slope(list(sizes), finals))
            axis.set(xlabel="P T (gradients in all)", ylabel="f(output) - f*", title=f"{name}, H = 8")
    return Claim(
        "local_sgd_speedup_workers",
        PAPER,
        "With the weighted average as output the error falls as 1/(P T): a linear speed-up in the workers "
        "(Corollary 2.3).",
        verdict(*(-1.25 < s < -0.8 for s in slopes)),
        f"After {steps} steps the error falls with P as P^{slopes[0]:.2f} on the quadratic and P^{slopes[1]:.2f} on "
        f"logistic regression, from P = 1 to {sizes[-1]} (the claim: P^-1, once T is large).",
        f"Simulation; quadratic (n = 20, condition 10) and logistic regression on breast cancer (condition "
        f"{Logistic(0.05).smoothness / 0.05:.0f}); b = 1, H = 8, step sizes of Theorem 2.2.",
    )


def speedup_in_batch(budget: Budget) -> Claim:
    """Error against b at P = 4."""
    problem, steps, sizes = Logistic(0.05), budget.steps(8192), (1, 2, 4, 8, 16)
    finals = []
    with figure(budget, "local_sgd_speedup_batch") as axis:
        for batch in sizes:
            options = {"workers": 4, "steps": steps, "repeats": budget.repeats(8), "batch": batch}
            setup, shift = theorem(problem, 8, **options)
            errors = output_errors(problem, setup, shift, powers(max(8, steps // 64), steps))
            axis.loglog(list(errors), list(errors.values()), marker=".", label=f"b = {batch}")
            finals.append(errors[steps])
        axis.set(xlabel="T", ylabel="f(output) - f*", title="logistic regression, P = 4, H = 8")
    found = slope(list(sizes), finals)
    return Claim(
        "local_sgd_speedup_batch",
        PAPER,
        "Mini-batches of b reduce the variance by b: a linear speed-up in b as well (Remark 2.4).",
        verdict(-1.25 < found < -0.8),
        f"The error after {steps} steps falls as b^{found:.2f} from b = 1 to {sizes[-1]}.",
        "Simulation; logistic regression on breast cancer, P = 4, H = 8.",
    )


def effect_of_period(budget: Budget) -> Claim:
    """Error against H at a fixed number of steps."""
    problem, workers, steps = Logistic(0.05), 8, budget.steps(4096)
    periods = powers(1, steps)
    errors = []
    for period in periods:
        setup, _ = theorem(problem, period, workers=workers, steps=steps, repeats=budget.repeats(8))
        shift = suggest_shift(
            problem.smoothness / problem.strong_convexity, 1
        )  # one rate for all H: H alone varies
        setup.rate = lambda t, a=shift: 4.0 / (problem.strong_convexity * (a + t))
        errors.append(output_errors(problem, setup, shift, [steps])[steps])
    free = suggest_period(steps, workers)
    within = [p for p, e in zip(periods, errors, strict=True) if e <= 1.1 * errors[0]]
    at_free = max(e for p, e in zip(periods, errors, strict=True) if p <= free)
    with figure(budget, "local_sgd_period") as axis:
        axis.semilogy(periods, errors, marker="o")
        axis.set_xscale("log", base=2)
        axis.axvline(free, ls="--", color="gray", label=f"sqrt(T / (P b)) = {free}")
        axis.set(
            xlabel="H", ylabel="f(output) - f*", title=f"logistic regression, P = {workers}, T = {steps}"
        )
    return Claim(
        "local_sgd_period",
        PAPER,
        "H up to O(sqrt(T / (P b))) costs nothing asymptotically; larger H costs (section 2.2).",
        verdict(at_free <= 1.1 * errors[0], errors[-1] > 1.1 * errors[0]),
        f"At T = {steps} and P = {workers} the error stays within 10 % of H = 1 up to H = {max(within)}, where the "
        f"formula with constant 1 says {free}; averaging only at the end (H = T) has {errors[-1] / errors[0]:.2f} "
        "times the error of H = 1.",
        "Simulation; logistic regression on breast cancer, b = 1, the same step sizes for every H.",
    )


def growth_of_period(budget: Budget) -> Claim:
    """Error against T when H grows with T."""
    problem, workers = Logistic(0.05), 8
    totals = powers(budget.steps(256), budget.steps(8192))
    rules = {"H = 1": 0.0, "H = T^0.5": 0.5, "H = T^0.75": 0.75, "H = T (one shot)": 1.0}
    curves = {}
    with figure(budget, "local_sgd_growing_period") as axis:
        for name, power in rules.items():
            curves[name] = []
            for steps in totals:
                period = max(1, round(steps**power))
                setup, shift = theorem(
                    problem, period, workers=workers, steps=steps, repeats=budget.repeats(6)
                )
                curves[name].append(output_errors(problem, setup, shift, [steps])[steps])
            axis.loglog(totals, curves[name], marker=".", label=name)
        axis.set(xlabel="T", ylabel="f(output) - f*", title=f"logistic regression, P = {workers}")
    falls = [curves[name][-1] < curves[name][0] / 4 for name in list(rules)[:3]]
    ratios = {name: curve[-1] / curves["H = 1"][-1] for name, curve in curves.items()}
    return Claim(
        "local_sgd_growing_period",
        PAPER,
        "Local SGD converges for every H = o(T), at the rate of mini-batch SGD for H = O(sqrt T); one-shot averaging "
        "is not covered (section 2.2).",
        verdict(*falls, ratios["H = T^0.5"] < 1.2, ratios["H = T (one shot)"] > ratios["H = T^0.5"]),
        f"At T = {totals[-1]} the errors relative to H = 1 are {ratios['H = T^0.5']:.2f} for H = T^0.5, "
        f"{ratios['H = T^0.75']:.2f} for H = T^0.75 and {ratios['H = T (one shot)']:.2f} for one-shot averaging. From "
        f"T = {totals[-3]} to {totals[-1]} they fall by factors of "
        + ", ".join(f"{curve[-3] / curve[-1]:.2f} ({name})" for name, curve in curves.items())
        + ". (The step sizes depend on H through the shift.)",
        "Simulation; logistic regression on breast cancer, b = 1, step sizes of Theorem 2.2.",
    )


def growing_gaps(budget: Budget) -> Claim:
    """Error against the number of averagings: gaps that grow, and the same number of averagings evenly spaced."""
    problem, workers, steps = Logistic(0.05), 8, budget.steps(4096)
    shift = suggest_shift(problem.smoothness / problem.strong_convexity, 1)  # one rate for all

    def error(sync: SyncSet) -> float:
        rate = lambda t: 4.0 / (problem.strong_convexity * (shift + t))  # noqa: E731
        setup = Setup(problem, workers, steps, rate, repeats=budget.repeats(8), sync=sync)
        return output_errors(problem, setup, shift, [steps])[steps]

    counts, growing, even = [], [], []
    for maximum in powers(8, steps // 2):
        sync = Growing(1, maximum, total_steps=steps)
        counts.append(sum(t in sync for t in range(1, steps + 1)))
        growing.append(error(sync))
        even.append(error(AtSteps(steps * (i + 1) // counts[-1] for i in range(counts[-1]))))
    ratios = [g / e for g, e in zip(growing, even, strict=True)]
    with figure(budget, "local_sgd_growing_gaps") as axis:
        axis.loglog(counts, even, marker="o", label="evenly spaced")
        axis.loglog(counts, growing, marker=".", label="gaps 1, 2, 4, ... up to a largest")
        axis.set(
            xlabel="averagings",
            ylabel="f(output) - f*",
            title=f"logistic regression, P = {workers}, T = {steps}",
        )
    return Claim(
        "local_sgd_growing_gaps",
        PAPER,
        "Averaging often at first, while steps are large, and rarely later may be better than evenly (section 3 suggests "
        "it, without a theorem).",
        verdict(min(ratios) < 0.95, max(ratios) < 1.05),
        f"At equal numbers of averagings growing gaps have {min(ratios):.2f} to {max(ratios):.2f} times the error of evenly "
        f"spaced ones ({ratios[-1]:.2f} at {counts[-1]} averagings in {steps} steps, {ratios[0]:.2f} at {counts[0]}).",
        "Simulation; logistic regression on breast cancer, b = 1, the set Growing(1, maximum), the same step sizes for all.",
    )


CLAIMS = (speedup_in_workers, speedup_in_batch, effect_of_period, growth_of_period, growing_gaps)
