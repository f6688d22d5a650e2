"""ResNet-20 and the LSTM under M-AVG against K-AVG with the same budget, by the library."""

from __future__ import annotations

import torch

from commhooks.averaging import BlockMomentum
from commhooks.transports import in_process

from .claims import Budget, Claim, figure, verdict
from .gtopk import smooth
from .models import Task, make_task

WORKERS, PERIOD = 4, 4


def train(task: Task, steps: int, mu: float) -> tuple[list[float], float]:
    """Losses of the workers' steps, averaged, and the test score of the final averaged model."""

    def work(transport: in_process.InProcessTransport) -> tuple[list[float], float]:
        model, batches = task.make(transport.rank, WORKERS)
        optimizer = torch.optim.SGD(model.parameters(), lr=task.rate / 2)
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


def block_momentum(budget: Budget) -> Claim:
    """Loss curves and test scores."""
    found: dict[str, dict[float, tuple[list[float], float]]] = {}
    with figure(budget, "m_avg_networks", 2) as axes:
        for axis, (name, steps) in zip(axes, (("resnet20", 120), ("lstm", 240)), strict=True):
            steps = budget.steps(steps) // PERIOD * PERIOD
            found[name] = {mu: train(make_task(name), steps, mu) for mu in (0.0, 0.7)}
            for mu, (losses, _) in found[name].items():
                axis.semilogy(losses, label="K-AVG" if mu == 0 else f"M-AVG, mu = {mu}")
            axis.set(
                xlabel="steps of each worker", ylabel="training loss", title=f"{name}, P = 4, K = {PERIOD}"
            )
    res, lstm = found["resnet20"], found["lstm"]
    return Claim(
        "m_avg_networks",
        "M-AVG",
        "M-AVG ends with better validation accuracy than K-AVG on real networks with the same budget (Table I).",
        verdict(res[0.7][1] > res[0.0][1], lstm[0.7][1] < lstm[0.0][1]),
        f"ResNet-20 on the digits: test accuracy {res[0.7][1]:.1%} (M-AVG) against {res[0.0][1]:.1%} (K-AVG), training "
        f"losses {res[0.7][0][-1]:.3f} and {res[0.0][0][-1]:.3f}; LSTM on text: test perplexity {lstm[0.7][1]:.2f} "
        f"against {lstm[0.0][1]:.2f}. One seed each; the budget is short, so this shows speed more than final quality.",
        "Library, 4 threads, the same batches and rate for both.",
    )


CLAIMS = (block_momentum,)
