"""The networks of `scripts/train.py` with their data, dealt to ranks in one process."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from training.models import MLP, LanguageModel, ResNet20

from .problems import digits

Batch = tuple[Tensor, Tensor]
TITLES = {"mlp": "perceptron", "resnet20": "ResNet-20", "lstm": "LSTM"}
"""What the figures call the networks."""


@dataclass(frozen=True)
class Task:
    """A model, its data and its rate. ``make(rank, world_size)`` gives the model, equal on all ranks, and batches."""

    name: str
    rate: float
    make: Callable[[int, int], tuple[nn.Module, Iterator[Batch]]]
    loss: Callable[[nn.Module, Batch], Tensor]
    score: Callable[[nn.Module], float]


def make_task(name: str, seed: int = 0) -> Task:
    """``"mlp"`` or ``"resnet20"`` on the digits (score: test accuracy), ``"lstm"`` on text (score: perplexity)."""
    if name == "lstm":
        return _language(seed)
    return _images(name, seed, (lambda: MLP(64)) if name == "mlp" else (lambda: ResNet20(channels=1)))


def _seeded(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    """The model every rank copies. Made on the main thread: torch's generator is shared by all threads."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def _draws(seed: int, rank: int) -> torch.Generator:
    return torch.Generator().manual_seed(50 + rank + 1000 * seed)


def _images(name: str, seed: int, build: Callable[[], nn.Module], batch: int = 16) -> Task:
    images, labels, test_images, test_labels = digits()
    images, test_images = (t.float().reshape(-1, 1, 8, 8) for t in (images, test_images))

    prototype = _seeded(seed, build)

    def make(rank: int, world_size: int) -> tuple[nn.Module, Iterator[Batch]]:
        model = copy.deepcopy(prototype)

        def batches() -> Iterator[Batch]:
            generator = _draws(seed, rank)
            while True:
                rows = torch.randint(len(images), (batch,), generator=generator)
                yield images[rows], labels[rows]

        return model, batches()

    def loss(model: nn.Module, data: Batch) -> Tensor:
        return nn.functional.cross_entropy(model(data[0]), data[1])

    def score(model: nn.Module) -> float:
        model.eval()
        with torch.no_grad():
            return float((model(test_images).argmax(dim=-1) == test_labels).float().mean())

    return Task(name, 0.05, make, loss, score)


def _language(seed: int, hidden: int = 64, batch: int = 8, window: int = 20, length: int = 60_000) -> Task:
    import argparse
    import textwrap

    text = "".join(open(module.__file__ or "").read() for module in (argparse, textwrap))[:length]
    symbols = sorted(set(text))
    tokens = torch.tensor([symbols.index(c) for c in text])
    train, test = tokens[: int(0.9 * len(tokens))], tokens[int(0.9 * len(tokens)) :]

    def cut(source: Tensor, starts: Tensor) -> Batch:
        rows = starts + torch.arange(window + 1)[:, None]  # (time, batch)
        return source[rows[:-1]], source[rows[1:]]

    prototype = _seeded(seed, lambda: LanguageModel(len(symbols), hidden=hidden, dropout=0.0))

    def make(rank: int, world_size: int) -> tuple[nn.Module, Iterator[Batch]]:
        model = copy.deepcopy(prototype)

        def batches() -> Iterator[Batch]:
            generator = _draws(seed, rank)
            while True:
                yield cut(train, torch.randint(len(train) - window - 1, (batch,), generator=generator))

        return model, batches()

    def loss(model: nn.Module, data: Batch) -> Tensor:
        logits, _ = model(data[0], model.start(data[0].shape[1]))
        return nn.functional.cross_entropy(logits.flatten(0, 1), data[1].flatten())

    def score(model: nn.Module) -> float:
        with torch.no_grad():
            starts = torch.arange(0, len(test) - window - 1, window)
            value = float(loss(model, cut(test, starts)))
        return math.exp(value) if value < 100 else math.inf  # diverged

    return Task("lstm", 2.0, make, loss, score)
