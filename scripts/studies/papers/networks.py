"""ResNet-20 and the LSTM under M-AVG against K-AVG with the same budget, by the library."""

from __future__ import annotations

import math

import torch

from commhooks.averaging import BlockMomentum
from commhooks.transports import in_process

from .claims import Budget, Claim, figure, verdict
from .gtopk import smooth
from .models import TITLES, Task, make_task

WORKERS, PERIOD = 4, 4
SEEDS = 3
SHARES = (1.0, 2.0, 4.0, 8.0)  # rates that are tried, in the task's own


def train(task: Task, steps: int, mu: float, rate: float) -> tuple[list[float], float]:
    """Losses of the workers' steps, averaged, and the test score of the final averaged model."""

    def work(transport: in_process.InProcessTransport) -> tuple[list[float], float]:
        model, batches = task.make(transport.rank, WORKERS)
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        averager = BlockMomentum(mu, PERIOD, params=model.parameters(), module=model, transport=transport)
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = task.loss(model, next(batches))
            loss.backward()
            optimizer.step()
            averager.average_parameters(model.parameters())
            losses.append(float(loss.detach()))
        return losses, task.score(model)

    results = in_process.run(WORKERS, work, timeout_s=120.0)
    return smooth(torch.tensor([r[0] for r in results]).mean(dim=0)), results[0][1]


def compare(budget: Budget, name: str, steps: int) -> dict[float, tuple[list[float], list[float], float]]:
    """For K-AVG and M-AVG, at the rate best for each: mean losses over seeds, the seeds' scores, and the rate."""
    higher_is_better = name == "resnet20"
    tasks = [make_task(name, seed) for seed in range(budget.repeats(SEEDS))]
    found = {}
    for mu in (0.0, 0.7):
        tried = []
        for share in SHARES[:1] if budget.quick else SHARES:
            rate = tasks[0].rate * share
            results = [train(task, steps, mu, rate) for task in tasks]
            scores = [score if math.isfinite(score) else math.inf for _, score in results]
            losses = torch.tensor([losses for losses, _ in results]).mean(dim=0).tolist()
            tried.append((losses, scores, rate))
        key = lambda run: sum(run[1]) * (-1 if higher_is_better else 1)  # noqa: E731
        found[mu] = min(tried, key=key)
    return found


def block_momentum(budget: Budget) -> Claim:
    """Loss curves and test scores, each at its own best rate."""
    found = {}
    with figure(budget, "m_avg_networks", 2) as axes:
        for axis, (name, steps) in zip(axes, (("resnet20", 120), ("lstm", 240)), strict=True):
            found[name] = compare(budget, name, budget.steps(steps) // PERIOD * PERIOD)
            for mu, (losses, _, rate) in found[name].items():
                axis.semilogy(
                    losses, label=("K-AVG" if mu == 0 else f"M-AVG, mu = {mu}") + f", rate {rate:g}"
                )
            axis.set(
                xlabel="steps of each worker",
                ylabel="training loss",
                title=f"{TITLES[name]}, P = 4, K = {PERIOD}",
            )
    (k_res, m_res), (k_lstm, m_lstm) = (
        [(sum(scores) / len(scores), min(scores), max(scores), rate) for _, scores, rate in runs.values()]
        for runs in found.values()
    )
    untuned = [
        name
        for name, runs in found.items()
        if max(rate for _, _, rate in runs.values()) == make_task(name).rate * SHARES[-1]
    ]
    at_the_end = f" On {' and '.join(untuned)} the best rate is the largest tried." if untuned else ""
    return Claim(
        "m_avg_networks",
        "M-AVG",
        "M-AVG ends with better validation accuracy than K-AVG on real networks with the same budget (Table I).",
        verdict(m_res[0] > k_res[0], m_lstm[0] < k_lstm[0], not at_the_end),
        f"Means over {budget.repeats(SEEDS)} seeds (smallest to largest), each at its best rate: ResNet-20 on the digits, "
        f"test accuracy {m_res[0]:.1%} ({m_res[1]:.1%} to {m_res[2]:.1%}; M-AVG, rate {m_res[3]:g}) against {k_res[0]:.1%} "
        f"({k_res[1]:.1%} to {k_res[2]:.1%}; K-AVG, rate {k_res[3]:g}); LSTM on text, test perplexity {m_lstm[0]:.2f} "
        f"({m_lstm[1]:.2f} to {m_lstm[2]:.2f}; rate {m_lstm[3]:g}) against {k_lstm[0]:.2f} ({k_lstm[1]:.2f} to {k_lstm[2]:.2f}; "
        f"rate {k_lstm[3]:g}).{at_the_end} The budget is short, so this shows speed more than final quality.",
        f"Library, 4 threads, the same batches for both; rates {', '.join(f'{s:g}' for s in SHARES)} times the task's were "
        "tried for each, the best by the mean test score is shown.",
    )


CLAIMS = (block_momentum,)
