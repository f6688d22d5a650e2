"""Stand-ins with the parameter shapes of real networks and a cheap backward.

Step times here are about communication. Each stand-in has the parameters of the named network, layer by
layer, and goes through DDP as any model does. Its backward hands out slices of one pool of normal random
numbers as gradients instead of computing them, so that 8 ranks fit on two cores. `delay_s` adds a pause to
backward, spread over the parameters by size, in which the CPU is free, as when a device computes.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]


def resnet20() -> list[Shape]:
    """ResNet-20 on CIFAR-10: 0.27M parameters."""
    shapes: list[Shape] = [(16, 3, 3, 3), (16,), (16,)]
    inputs = 16
    for outputs in (16, 32, 64):
        for _ in range(3):
            shapes += [
                (outputs, inputs, 3, 3),
                (outputs,),
                (outputs,),
                (outputs, outputs, 3, 3),
                (outputs,),
                (outputs,),
            ]
            inputs = outputs
    return [*shapes, (10, 64), (10,)]


def resnet50() -> list[Shape]:
    """ResNet-50 on ImageNet: 25.56M parameters."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for outputs, source, kernel in ((width, inputs, 1), (width, width, 3), (4 * width, width, 1)):
                shapes += [(outputs, source, kernel, kernel), (outputs,), (outputs,)]
            if block == 0:
                shapes += [(4 * width, inputs, 1, 1), (4 * width,), (4 * width,)]
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def vgg16() -> list[Shape]:
    """VGG-16 with batch norm and one linear layer, on CIFAR-10: 14.7M parameters."""
    shapes: list[Shape] = []
    inputs = 3
    for outputs in (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512):
        shapes += [(outputs, inputs, 3, 3), (outputs,), (outputs,), (outputs,)]
        inputs = outputs
    return [*shapes, (10, 512), (10,)]


def lstm1500() -> list[Shape]:
    """2-layer LSTM with 1500 hidden units on PTB's 10,000 words: 66M parameters."""
    layer: list[Shape] = [(6000, 1500), (6000, 1500), (6000,), (6000,)]
    return [(10_000, 1500), *layer, *layer, (10_000, 1500), (10_000,)]


MODELS = {"resnet20": resnet20, "vgg16": vgg16, "resnet50": resnet50, "lstm1500": lstm1500}


def equal_layers(layers: int, side: int) -> list[Shape]:
    """`layers` square matrices: DDP makes one bucket of each when its cap is below their size."""
    return [(side, side)] * layers


def numel(shapes: list[Shape]) -> int:
    """Number of parameters."""
    return sum(math.prod(s) for s in shapes)


class StandIn(nn.Module):
    """Parameters of the given shapes; the backward of `forward()`'s scalar fills them with random gradients.

    Args:
        shapes: of the parameters, in forward order.
        seed: of the gradients; give each rank another.
        delay_s: pause in one backward, in all.
    """

    def __init__(self, shapes: list[Shape], seed: int, delay_s: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.layers = nn.ParameterList([torch.zeros(s) for s in shapes])
        total, largest = numel(shapes), max(math.prod(s) for s in shapes)
        self.pool = torch.randn(max(largest + 4096, min(total, 8_000_000)), generator=generator)
        self.delays = [delay_s * math.prod(s) / total for s in shapes]
        self.generator = generator

    def forward(self, start: Tensor) -> Tensor:
        """`start`: a scalar that requires a gradient."""
        room = self.pool.numel()
        for weight, delay in zip(self.layers, self.delays, strict=True):
            limit = room - weight.numel() + 1
            offset = int(torch.randint(limit, (1,), generator=self.generator))
            gradient = self.pool[offset : offset + weight.numel()].view(weight.shape)
            start = _Layer.apply(start, weight, gradient, delay)
        return start


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, gradient: Tensor, delay_s: float) -> Tensor:
        context.gradient, context.delay_s = gradient, delay_s
        return x.clone()

    @staticmethod
    def backward(context: Any, above: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        if context.delay_s > 1e-4:
            time.sleep(context.delay_s)
        return above, context.gradient, None, None
