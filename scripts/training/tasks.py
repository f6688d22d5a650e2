"""A task: data that are dealt out to the ranks, the model that fits them, loss and score.

Batches are a pure function of (seed, epoch, step, rank), so the position in the data is two numbers and a resumed run
reads what the uninterrupted one would have read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import data_cifar10, data_digits, data_ptb, data_text, gpt
from .models import MLP, LanguageModel, ResNet20

TASKS = ("digits", "text", "cifar10", "ptb")
MODELS = ("resnet20", "mlp", "lstm", *gpt.SIZES)
LANGUAGE_MODELS = ("lstm", *gpt.SIZES)


@dataclass(frozen=True)
class Share:
    """Which part of the data is this rank's."""

    rank: int
    size: int
    batch_size: int  # per rank
    seed: int


class Task(Protocol):
    """What the loop needs to know of a task; `carry` is what a rank takes from one step to the next (or None)."""

    model: nn.Module
    steps_per_epoch: int

    def start(self) -> Tensor | None:
        """The carry at the start of an epoch."""

    def loss(
        self, model: nn.Module, epoch: int, step: int, carry: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Mean loss of this rank's batch, with its graph, and the carry for the next step."""

    def evaluate(self, model: nn.Module) -> Tensor:
        """Sums over this rank's share of the test set: float64 [loss, correct, count]."""


class Images:
    """Classification of images held in memory, shuffled anew each epoch, the last incomplete batch left out."""

    def __init__(
        self, arrays: data_digits.Arrays, model: nn.Module, share: Share, device: torch.device
    ) -> None:
        total = share.batch_size * share.size
        if len(arrays.train_x) < total:
            raise ValueError(
                f"batch_size={share.batch_size} on {share.size} ranks: more than the {len(arrays.train_x)} examples"
            )
        self.arrays, self.model, self.share, self.device = arrays, model, share, device
        self.steps_per_epoch = len(arrays.train_x) // total
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def start(self) -> Tensor | None:
        return None

    def batch(self, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Images (batch_size, channels, height, width) float32 and labels (batch_size,) int64 of this rank."""
        share = self.share
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(share.seed * 1_000_003 + epoch)
            self._order = (epoch, torch.randperm(len(self.arrays.train_x), generator=generator))
        first = (step * share.size + share.rank) * share.batch_size
        chosen = self._order[1][first : first + share.batch_size]
        x, y = self.arrays.train_x[chosen], self.arrays.train_y[chosen]
        if self.arrays.augment:
            seed = ((share.seed * 1_000_003 + epoch) * 100_003 + step) * 1009 + share.rank
            x = data_cifar10.crop_and_flip(x, torch.Generator().manual_seed(seed % 2**63))
        return x.to(self.device), y.to(self.device)

    def loss(
        self, model: nn.Module, epoch: int, step: int, carry: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        x, y = self.batch(epoch, step)
        return functional.cross_entropy(model(x), y), None

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> Tensor:
        sums = torch.zeros(3, dtype=torch.float64)
        mine = slice(self.share.rank, None, self.share.size)
        for x, y in zip(self.arrays.test_x[mine].split(500), self.arrays.test_y[mine].split(500)):
            logits = model(x.to(self.device)).cpu()
            loss = functional.cross_entropy(logits, y, reduction="sum").item()
            correct = (logits.argmax(1) == y).sum().item()
            sums += torch.tensor([loss, correct, len(y)], dtype=torch.float64)
        return sums


class Text:
    """Language modelling by truncated backpropagation: the stream is cut into P * batch_size columns.

    A window is `window` tokens of this rank's columns; the LSTM's state goes from window to window (the carry).
    """

    def __init__(
        self, corpus: data_text.Corpus, model: LanguageModel, share: Share, device: torch.device, window: int
    ) -> None:
        columns = share.batch_size * share.size
        length = len(corpus.train) // columns
        if length <= window:
            raise ValueError(
                f"batch_size={share.batch_size} on {share.size} ranks: columns shorter than {window} tokens"
            )
        mine = slice(share.rank * share.batch_size, (share.rank + 1) * share.batch_size)
        self.tokens = corpus.train[: length * columns].view(columns, length)[mine].t().contiguous()
        length = len(corpus.test) // share.size
        self.test = corpus.test[share.rank * length : (share.rank + 1) * length]
        self.model, self.share, self.device, self.window = model, share, device, window
        self.steps_per_epoch = (len(self.tokens) - 1) // window

    def start(self) -> Tensor | None:
        return self.model.start(self.share.batch_size)

    def loss(
        self, model: nn.Module, epoch: int, step: int, carry: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        first = step * self.window
        x = self.tokens[first : first + self.window].to(self.device)
        y = self.tokens[first + 1 : first + 1 + self.window].to(self.device)
        logits, carry = model(x, carry)
        return functional.cross_entropy(logits.flatten(0, 1), y.flatten()), carry

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> Tensor:
        sums = torch.zeros(3, dtype=torch.float64)
        columns = 8
        length = len(self.test) // columns
        tokens = self.test[: length * columns].view(columns, length).t().contiguous()
        carry = self.model.start(columns)
        for first in range(0, length - 1, 200):
            count = min(200, length - 1 - first)
            logits, carry = model(tokens[first : first + count].to(self.device), carry)
            y = tokens[first + 1 : first + 1 + count].flatten()
            logits = logits.flatten(0, 1).cpu()
            loss = functional.cross_entropy(logits, y, reduction="sum").item()
            correct = (logits.argmax(1) == y).sum().item()
            sums += torch.tensor([loss, correct, len(y)], dtype=torch.float64)
        return sums


class Windows:
    """Language modelling on windows of `window` tokens, shuffled anew each epoch, without a state between them."""

    def __init__(
        self, corpus: data_text.Corpus, model: gpt.GPT, share: Share, device: torch.device, window: int
    ) -> None:
        total = share.batch_size * share.size
        # one window less than there are, so that the cut can begin anywhere within a window
        self.windows = (len(corpus.train) - 1) // window - 1
        if self.windows < total or len(corpus.test) <= window:
            raise ValueError(
                f"batch_size={share.batch_size} on {share.size} ranks: the text has {max(0, self.windows)} windows of "
                f"{window} tokens to train and {len(corpus.test)} tokens to test"
            )
        self.corpus, self.model, self.share, self.device, self.window = corpus, model, share, device, window
        self.steps_per_epoch = self.windows // total
        self._epoch, self._starts = -1, torch.empty(0, dtype=torch.int64)

    def start(self) -> Tensor | None:
        return None

    def batch(self, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Tokens and the tokens that follow them, both (batch_size, window) int64, of this rank."""
        share = self.share
        if self._epoch != epoch:
            generator = torch.Generator().manual_seed(share.seed * 1_000_003 + epoch)
            offset = torch.randint(self.window, (1,), generator=generator)
            self._starts = offset + self.window * torch.randperm(self.windows, generator=generator)
            self._epoch = epoch
        first = (step * share.size + share.rank) * share.batch_size
        return self._cut(self.corpus.train, self._starts[first : first + share.batch_size])

    def _cut(self, tokens: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        rows = tokens[starts[:, None] + torch.arange(self.window + 1)].to(self.device)
        return rows[:, :-1], rows[:, 1:]

    def loss(
        self, model: nn.Module, epoch: int, step: int, carry: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        x, y = self.batch(epoch, step)
        return functional.cross_entropy(model(x).flatten(0, 1), y.flatten()), None

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> Tensor:
        sums = torch.zeros(3, dtype=torch.float64)
        starts = torch.arange(0, len(self.corpus.test) - self.window, self.window)
        for part in starts[self.share.rank :: self.share.size].split(32):
            x, y = self._cut(self.corpus.test, part)
            logits = model(x).flatten(0, 1)
            loss = functional.cross_entropy(logits, y.flatten(), reduction="sum").item()
            correct = (logits.argmax(1) == y.flatten()).sum().item()
            sums += torch.tensor([loss, correct, y.numel()], dtype=torch.float64)
        return sums

    def sample(self, count: int) -> str:
        """Text of `count` tokens that the model writes, beginning where the test text begins."""
        begin = self.corpus.test[: min(16, self.window)]
        written = gpt.sample(self.model, begin, count, self.share.seed)
        return self.corpus.text(torch.cat((begin, written)))


def make(options: Any, share: Share, device: torch.device) -> Task:
    """The task that `options` (the command line of train.py) asks for, with its model on `device`.

    Raises:
        ValueError: a model that does not fit the data, or data that are not there.
    """
    language = options.task in ("text", "ptb")
    if language != (options.model in LANGUAGE_MODELS):
        raise ValueError(f"--model {options.model} does not fit --task {options.task}")
    if language:
        corpus = (
            data_ptb.load(_folder(options))
            if options.task == "ptb"
            else data_text.load(options.level, options.text_size, options.vocabulary, _texts(options))
        )
        if options.model in gpt.SIZES:
            size, window = corpus.vocabulary_size, options.window
            transformer = gpt.GPT(size, window, options.model, options.dropout).to(device)
            return Windows(corpus, transformer, share, device, window)
        network = LanguageModel(corpus.vocabulary_size, options.hidden, dropout=options.dropout).to(device)
        return Text(corpus, network, share, device, options.window)
    arrays = data_digits.load() if options.task == "digits" else data_cifar10.load(_folder(options))
    channels = arrays.train_x.shape[1]
    classes = int(arrays.train_y.max()) + 1
    model = (
        ResNet20(channels, classes)
        if options.model == "resnet20"
        else MLP(arrays.train_x[0].numel(), classes, options.hidden)
    )
    return Images(arrays, model.to(device), share, device)


def _texts(options: Any) -> list[Path] | None:
    """The files of `--text-file`; None: the standard library's sources."""
    files = getattr(options, "text_file", None)
    if files is None:
        return None
    missing = [file for file in files if not Path(file).is_file()]
    if missing:
        raise ValueError(f"--text-file {missing[0]} is no file")
    return [Path(file) for file in files]


def _folder(options: Any) -> Path:
    if options.data is None:
        raise ValueError(f"--task {options.task} is read from a local folder: give it with --data DIR")
    return Path(options.data)
