"""Gradients for `scripts/bench kernels`: gaussian, heavy-tailed, and real ones from a training run with error feedback."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from commhooks.native import ops
from commhooks.native.fused import Fused

DATA = ("gaussian", "heavy", "real")
_STEPS, _KEPT = 120, 20


@dataclass(frozen=True)
class RealRun:
    """What a training run leaves.

    Attributes:
        gradients: the last gradients, each flat float32 of all parameters.
        hits: steps in which the guess of `select_topk` held.
        steps: all steps.
    """

    gradients: list[Tensor]
    hits: int
    steps: int


def train(density: float) -> RealRun:
    """Trains an MLP of 1.1M parameters on scikit-learn's digits; SGD gets only the top-k of each step, the rest stays."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    model = nn.Sequential(
        nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
    )
    parameters = list(model.parameters())
    numel = sum(p.numel() for p in parameters)
    residual, gradients, hits = torch.zeros(numel), [], 0
    for step in range(_STEPS):
        batch = torch.randint(0, len(labels), (64,))
        model.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        flat = torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None])
        gradients = [*gradients[1 - _KEPT :], flat]
        selected = ops.select_topk(Fused(flat, residual), max(1, int(density * numel)), seed=step)
        hits += int(selected.report[2] == 0)
        update = torch.zeros(numel)
        ops.scatter_add(update, selected.values, selected.indices, -0.1)
        with torch.no_grad():
            for parameter, part in zip(
                parameters, update.split([p.numel() for p in parameters]), strict=True
            ):
                parameter += part.view_as(parameter)
    return RealRun(gradients, hits, _STEPS)


class Gradients:
    """Fills one buffer of `numel` elements with a fresh gradient for every repetition.

    Real gradients are repeated to the length asked for (stated in the table's data column as `real`, tiled).
    """

    def __init__(self, data: str, numel: int, run: RealRun | None = None) -> None:
        self.buffer = torch.empty(numel)
        self._run = run
        self._count = 0
        generator = torch.Generator().manual_seed(numel)
        if data == "gaussian":
            self.buffer.normal_(0, 0.01, generator=generator)
        elif data == "heavy":
            # A log-normal scale on a normal variable: the largest of 1M is some thousand times the median.
            torch.randn(numel, generator=generator, out=self.buffer)
            self.buffer.mul_(torch.randn(numel, generator=generator).mul_(2).exp_())
        elif run is None:
            raise ValueError(f"data must be one of {DATA} (real needs a run), got {data!r}")
        self.next()

    def next(self) -> Tensor:
        """The gradient of the next repetition; real ones change from step to step, the others only in place."""
        if self._run is not None:
            source = self._run.gradients[self._count % len(self._run.gradients)]
            for part in self.buffer.split(source.numel()):
                part.copy_(source[: part.numel()])
        self._count += 1
        return self.buffer
