"""Models to measure with, in plain torch: every step has a forward and a backward pass of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

MODELS = ("resnet50", "gpt-10m")
_SQUARE = 1024
"""Width of the layers of a model that is made for a number of parameters."""


class Workload(NamedTuple):
    """What is measured.

    Attributes:
        name: for messages.
        model: the module that DDP wraps.
        loss: runs one forward pass of the module that it is given, and returns the loss.
    """

    name: str
    model: nn.Module
    loss: Callable[[nn.Module], Tensor]


class Source(NamedTuple):
    """Where a workload comes from: one of the three is given.

    Attributes:
        model: ``"resnet50"`` (25.6M parameters) or ``"gpt-10m"``.
        numel: about as many parameters, in square layers.
        function: ``PACKAGE:FUNCTION``. The function returns the model and a function of the model that runs
            one forward pass and returns the loss.
    """

    model: str | None = None
    numel: int | None = None
    function: str | None = None


def make_workload(source: Source, seed: int) -> Workload:
    """Makes the workload of a source. The model is the same on all ranks; ``seed`` is of this rank's inputs.

    Raises:
        ValueError: the function cannot be called, or returns something else.
    """
    torch.manual_seed(0)
    model, numel, function = source
    if function is not None:
        return _own(function)
    shape: tuple[int, ...]
    if model == "resnet50":
        made: nn.Module = ResNet50()
        shape, classes = (2, 3, 64, 64), 1000
    elif model == "gpt-10m":
        made = GPT()
        tokens = torch.randint(256, (2, 65), generator=torch.Generator().manual_seed(seed), device="cpu")
        inputs, targets = tokens[:, :-1], tokens[:, 1:].flatten()
        return Workload(model, made, lambda net: functional.cross_entropy(net(inputs).flatten(0, 1), targets))
    else:
        wanted = numel or _SQUARE**2
        width = min(_SQUARE, max(1, math.isqrt(wanted)))
        layers = max(1, round(wanted / width**2))
        made = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
        shape, classes = (4, width), width
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    y = torch.randint(classes, (shape[0],), generator=generator, device="cpu")
    return Workload(model or "square layers", made, lambda net: functional.cross_entropy(net(x), y))


def _own(name: str) -> Workload:
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError(f"--module must look like PACKAGE:FUNCTION, got {name!r}")
    try:
        made: Any = getattr(import_module(module), attribute)()
    except Exception as error:  # the user's own code may raise anything
        raise ValueError(f"--module {name} failed: {type(error).__name__}: {error}") from error
    if not (
        isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module) and callable(made[1])
    ):
        raise ValueError(
            f"--module {name} must return (model, function of the model), got {type(made).__name__}"
        )
    return Workload(name, *made)


class Bottleneck(nn.Module):
    """Three convolutions around a shortcut."""

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        outside = 4 * width
        self.body = nn.Sequential(
            *_convolution(inside, width, 1, 1),
            nn.ReLU(),
            *_convolution(width, width, 3, stride),
            nn.ReLU(),
            *_convolution(width, outside, 1, 1),
        )
        same = inside == outside and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(*_convolution(inside, outside, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        """(N, inside, H, W) to (N, 4 width, H / stride, W / stride)."""
        return functional.relu(self.body(x) + self.shortcut(x))


class ResNet50(nn.Module):
    """ResNet-50 (He et al. 2016): 25,557,032 parameters."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [*_convolution(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        inside = 64
        for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for block in range(blocks):
                layers.append(Bottleneck(inside, width, stride if block == 0 else 1))
                inside = 4 * width
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, 1000)."""
        out: Tensor = self.body(x)
        return out


class GPT(nn.Module):
    """A decoder of 8 layers of width 320 over bytes: about 10M parameters."""

    def __init__(self, width: int = 320, layers: int = 8, heads: int = 5) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(256, width), nn.Embedding(64, width)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, 0.0, batch_first=True, norm_first=True, activation="gelu"
        )
        self.body = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 256, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, T <= 64) int64 to (N, T, 256)."""
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        x = self.token(tokens) + self.place(torch.arange(length, dtype=torch.int64, device=tokens.device))
        out: Tensor = self.head(self.body(x, mask=mask, is_causal=True))
        return out


def _convolution(inside: int, outside: int, size: int, stride: int) -> tuple[nn.Module, nn.Module]:
    conv = nn.Conv2d(inside, outside, size, stride, size // 2, bias=False)
    return conv, nn.BatchNorm2d(outside)
