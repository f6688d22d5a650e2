"""The networks: ResNet-20 for small images, a multilayer perceptron, a 2-layer LSTM language model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut that subsamples and pads with zero channels (no parameters)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.extra = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.stride != 1 or self.extra:
            shortcut = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(y)) + shortcut)


class ResNet20(nn.Module):
    """He et al. 2015 for CIFAR-10, section 4.2, n = 3: 0.27 million parameters, any image of 4x4 and more.

    Input (N, channels, height, width) float32, output (N, classes) logits.
    """

    def __init__(self, channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        blocks = []
        inputs = 16
        for outputs, stride in ((16, 1), (32, 2), (64, 2)):
            for number in range(3):
                blocks.append(Block(inputs, outputs, stride if number == 0 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(functional.relu(self.norm(self.stem(x))))
        return self.head(y.mean(dim=(2, 3)))


class MLP(nn.Module):
    """Two hidden layers with ReLU; input (N, ...) is flattened to (N, inputs), output (N, classes) logits."""

    def __init__(self, inputs: int, classes: int = 10, hidden: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(inputs, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class LanguageModel(nn.Module):
    """Embedding, 2-layer LSTM and a linear decoder, with dropout between them (Zaremba et al. 2014).

    Input tokens (time, batch) int64 and the state (2, layers, batch, hidden) of the window before; output logits
    (time, batch, vocabulary) and the state after, detached.
    """

    def __init__(
        self, vocabulary: int, hidden: int = 128, layers: int = 2, dropout: float = 0.2, tie: bool = True
    ) -> None:
        super().__init__()
        self.hidden, self.layers = hidden, layers
        self.drop = nn.Dropout(dropout)
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.lstm = nn.LSTM(hidden, hidden, layers, dropout=dropout if layers > 1 else 0.0)
        self.decoder = nn.Linear(hidden, vocabulary)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)
        if tie:
            self.decoder.weight = self.embedding.weight

    def start(self, batch: int) -> Tensor:
        """The state before the first window: zeros (2, layers, batch, hidden)."""
        return torch.zeros(2, self.layers, batch, self.hidden, device=self.decoder.bias.device)

    def forward(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y, (h, c) = self.lstm(self.drop(self.embedding(tokens)), (state[0], state[1]))
        return self.decoder(self.drop(y)), torch.stack([h, c]).detach()
