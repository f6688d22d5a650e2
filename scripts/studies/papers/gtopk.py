"""gTop-k S-SGD (Shi et al.) by the library: Assumption 1's delta, convergence, the compression ratio."""

from __future__ import annotations

from typing import Any

import torch
from benchmarks.harness.figure import color

from commhooks import Bucket, Dense, ErrorFeedback, ExponentialWarmup, GTopK, Reducer, TopK
from commhooks.transports import in_process

from .claims import Budget, Claim, figure, verdict
from .models import TITLES, Task, make_task

WORKERS = 4


def train(
    task: Task, steps: int, density: float | None, warmup: int = 0, delta_every: int = 0
) -> dict[str, Any]:
    """One run with ``density`` (None: dense) on 4 threads; losses of each step averaged over ranks, deltas."""

    def work(transport: in_process.InProcessTransport) -> tuple[list[float], list[tuple[int, float]], float]:
        model, batches = task.make(transport.rank, WORKERS)
        parameters = list(model.parameters())
        optimizer = torch.optim.SGD(parameters, lr=task.rate)
        if density is None:
            reducer = Reducer(None, Dense(transport=transport), ErrorFeedback())
        else:
            schedule = ExponentialWarmup(density, warmup) if warmup else density
            reducer = Reducer(
                TopK(schedule), GTopK(transport=transport), ErrorFeedback(), dense_crossover=False,
                delta_every=delta_every,
            )  # fmt: skip
        losses, deltas = [], []
        keys, numels = tuple(str(i) for i in range(len(parameters))), tuple(p.numel() for p in parameters)
        for step in range(steps):
            optimizer.zero_grad()
            loss = task.loss(model, next(batches))
            loss.backward()
            flat = torch.cat([p.grad.reshape(-1) for p in parameters])
            reducer.reduce(Bucket(index=0, buffer=flat, keys=keys, numels=numels, is_last=True))
            for p, part in zip(parameters, flat.split(numels), strict=True):
                p.grad = part.view_as(p)
            optimizer.step()
            losses.append(float(loss.detach()))
            if delta_every and step % delta_every == 0 and reducer.last_delta is not None:
                deltas.append((step, reducer.last_delta))
        return losses, deltas, task.score(model)

    results = in_process.run(WORKERS, work, timeout_s=120.0)
    losses = torch.tensor([r[0] for r in results]).mean(dim=0)
    return {"losses": smooth(losses), "deltas": results[0][1], "score": sum(r[2] for r in results) / WORKERS}


def smooth(values: torch.Tensor, width: int = 12) -> list[float]:
    """Running means."""
    padded = torch.cat([values[:1].expand(width - 1), values])
    return padded.unfold(0, width, 1).mean(dim=-1).tolist()


def delta_and_convergence(budget: Budget) -> Claim:
    """Figure 1: delta through training, and losses of gTop-k against dense, for a ResNet-20 and an LSTM."""
    found = {}
    with figure(budget, "gtopk_delta_and_convergence", 4) as axes:
        for number, (name, steps) in enumerate((("resnet20", 160), ("lstm", 240))):
            task, steps = make_task(name), budget.steps(steps)
            dense = train(task, steps, None)
            sparse = train(task, steps, 0.001, warmup=steps // 4, delta_every=4)
            at, deltas = zip(*sparse["deltas"], strict=True)
            axes[2 * number].semilogy(at, [1.0 - delta for delta in deltas], color=color("gtopk"), marker=".")
            axes[2 * number].set(
                xlabel="step", ylabel="1 - delta (at least 0 is assumed)", title=TITLES[name]
            )
            axes[2 * number + 1].semilogy(dense["losses"], color=color("dense"), label="S-SGD")
            axes[2 * number + 1].semilogy(sparse["losses"], color=color("gtopk"), label="gTop-k")
            axes[2 * number + 1].set(xlabel="step", ylabel="training loss", title=TITLES[name])
            found[name] = (dense, sparse)
    largest = {name: max(d for _, d in sparse["deltas"]) for name, (_, sparse) in found.items()}
    close = {n: (d["losses"][-1], s["losses"][-1], d["losses"][0]) for n, (d, s) in found.items()}
    return Claim(
        "gtopk_delta_and_convergence",
        "gTop-k",
        "Assumption 1 holds through training (delta <= 1 at d/k = 1000), and gTop-k's loss follows S-SGD's (figure 1).",
        verdict(
            *(value <= 1.0 for value in largest.values()),
            *(sparse - dense < 0.1 * (first - dense) for dense, sparse, first in close.values()),
        ),
        "Largest delta: " + ", ".join(f"{v:.3f} ({n})" for n, v in largest.items()) + ". Losses at the end, dense and "
        "gTop-k: " + ", ".join(f"{d:.3f} and {s:.3f} ({n}, from {f:.2f})" for n, (d, s, f) in close.items())
        + "; scores on test data "
        + ", ".join(f"{d['score']:.3f} and {s['score']:.3f} ({n})" for n, (d, s) in found.items()) + ".",
        "Library (Reducer with GTopK), 4 threads; ResNet-20 on the digits (score: accuracy), LSTM on standard-library "
        "text (score: perplexity); one bucket, density 0.001 after a warm-up over a quarter of the steps. "
        "The loss counts as following when its gap at the end is below 10 % of the dense run's fall.",
    )  # fmt: skip


def compression_ratio(budget: Budget) -> Claim:
    """Figure 2: loss curves for several d/k at a fixed number of steps."""
    task, steps = make_task("mlp"), budget.steps(400)
    finals = {}
    with figure(budget, "gtopk_compression_ratio") as axis:
        for ratio in (1, 10, 100, 1000, 5000):
            found = train(task, steps, None if ratio == 1 else 1.0 / ratio)
            axis.semilogy(found["losses"], label=f"d/k = {ratio}" + (" (S-SGD)" if ratio == 1 else ""))
            finals[ratio] = found["losses"][-1]
        axis.set(xlabel="step", ylabel="training loss", title="perceptron on the digits, P = 4")
    values = list(finals.values())
    return Claim(
        "gtopk_compression_ratio",
        "gTop-k",
        "At a fixed number of steps a larger compression ratio d/k slows convergence down (eq. 27, figure 2).",
        verdict(values == sorted(values), values[-1] > 1.5 * values[0]),
        "Losses at the end: " + ", ".join(f"{v:.4f} at d/k = {r}" for r, v in finals.items()) + ".",
        f"Library, 4 threads; perceptron 64-128-128-10, {steps} steps without warm-up, the same rate for all.",
    )


CLAIMS = (delta_and_convergence, compression_ratio)
