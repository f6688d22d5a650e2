"""Gradients for `scripts/bench kernels`: gaussian, heavy-tailed, and real ones of a run with error feedback.

Real gradients are those of an MLP on scikit-learn's digits, or, where scikit-learn is missing, on text: the
Python standard library's sources, next character after eight. The data column says `real` or `real text`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from training import data_text

from commhooks.native import ops
from commhooks.native.fused import Fused

DATA = ("gaussian", "heavy", "real")
_STEPS, _KEPT = 120, 20
_CONTEXT, _WINDOWS = 8, 4096


@dataclass(frozen=True)
class RealRun:
    """What a training run leaves.

    Attributes:
        gradients: the last gradients, each flat float32 of all parameters.
        hits: steps in which the guess of `select_topk` held.
        steps: all steps.
        name: of the data, for the records.
    """

    gradients: list[Tensor]
    hits: int
    steps: int
    name: str = "real"


def digits() -> tuple[str, Tensor, Tensor]:
    """Name, inputs ``(1797, 64)`` and classes of scikit-learn's digits. ImportError without scikit-learn."""
    from sklearn.datasets import load_digits  # noqa: PLC0415

    data = load_digits()
    return "real", torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)


def text() -> tuple[str, Tensor, Tensor]:
    """Name, inputs (eight characters as one-hot rows) and next characters of the Python library's sources."""
    stream = data_text.load("char", size=200_000, vocabulary=96).train
    starts = torch.linspace(0, stream.numel() - _CONTEXT - 1, _WINDOWS).long()
    windows = stream[starts[:, None] + torch.arange(_CONTEXT)]
    return (
        "real text",
        nn.functional.one_hot(windows, 96).float().flatten(1),
        stream[starts + _CONTEXT],
    )


def task() -> tuple[str, Tensor, Tensor]:
    """What there is on this machine: digits, else text."""
    try:
        return digits()
    except ImportError:
        return text()


def train(density: float, device: str = "cpu") -> RealRun:
    """Trains an MLP of one to two million parameters; SGD gets only the top-k of each step, the rest stays.

    Returns:
        Gradients on the CPU, taken on ``device``.
    """
    torch.manual_seed(0)
    name, inputs, labels = task()
    model = nn.Sequential(
        nn.Linear(inputs.shape[1], 1024),
        nn.ReLU(),
        nn.Linear(1024, 1024),
        nn.ReLU(),
        nn.Linear(1024, int(labels.max()) + 1),
    ).to(device)
    inputs, labels = inputs.to(device), labels.to(device)
    parameters = list(model.parameters())
    numel = sum(p.numel() for p in parameters)
    residual, gradients, hits = torch.zeros(numel, device=device), [], 0
    for step in range(_STEPS):
        batch = torch.randint(0, len(labels), (64,)).to(device)
        model.zero_grad()
        nn.functional.cross_entropy(model(inputs[batch]), labels[batch]).backward()
        flat = torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None])
        gradients = [*gradients[1 - _KEPT :], flat.cpu()]
        selected = ops.select_topk(Fused(flat, residual), max(1, int(density * numel)), seed=step)
        hits += int(selected.report[2] == 0)
        update = torch.zeros(numel, device=device)
        ops.scatter_add(update, selected.values, selected.indices, -0.1)
        with torch.no_grad():
            for parameter, part in zip(
                parameters, update.split([p.numel() for p in parameters]), strict=True
            ):
                parameter += part.view_as(parameter)
    return RealRun(gradients, hits, _STEPS, name)


def tiled(source: Tensor, out: Tensor) -> Tensor:
    """Fills ``out`` with ``source``, repeated to its length."""
    for part in out.split(source.numel()):
        part.copy_(source[: part.numel()])
    return out


def heavy(out: Tensor, generator: torch.Generator) -> Tensor:
    """A log-normal scale on a normal variable: the largest of 1M is some thousand times the median."""
    out.normal_(generator=generator)
    return out.mul_(torch.empty_like(out).normal_(generator=generator).mul_(2).exp_())


class Gradients:
    """Fills one buffer of `numel` elements with a fresh gradient for every repetition.

    Real gradients are repeated to the length asked for.
    """

    def __init__(self, data: str, numel: int, run: RealRun | None = None) -> None:
        self.buffer = torch.empty(numel)
        self._run = run
        self._count = 0
        generator = torch.Generator().manual_seed(numel)
        if data == "gaussian":
            self.buffer.normal_(0, 0.01, generator=generator)
        elif data == "heavy":
            heavy(self.buffer, generator)
        elif run is None:
            raise ValueError(f"data must be one of {DATA} (real needs a run), got {data!r}")
        self.next()

    def next(self) -> Tensor:
        """The gradient of the next repetition, in :attr:`buffer`; only real ones change from step to step."""
        if self._run is not None:
            tiled(self._run.gradients[self._count % len(self._run.gradients)], self.buffer)
        self._count += 1
        return self.buffer
