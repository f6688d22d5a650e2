"""A GPT of about 1, 10 or 25 million parameters, and a sample of what it writes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

# by name: layers, width, heads. A layer has 12 width^2 weights.
SIZES: dict[str, tuple[int, int, int]] = {
    "gpt": (5, 128, 4),
    "gpt-10m": (6, 384, 6),
    "gpt-25m": (8, 512, 8),
}


class Layer(nn.Module):
    """Causal self-attention and a two-layer perceptron, each behind a LayerNorm and beside a shortcut."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.attend, self.mix = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.widen, self.narrow = (
            nn.Linear(width, 4 * width, bias=False),
            nn.Linear(4 * width, width, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        parts = self.attend(self.norm1(x)).view(batch, time, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        y = functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        y = self.mix(y.transpose(1, 2).reshape(batch, time, width))
        x = x + functional.dropout(y, self.dropout, self.training)
        y = self.narrow(functional.gelu(self.widen(self.norm2(x))))
        return x + functional.dropout(y, self.dropout, self.training)


class GPT(nn.Module):
    """Token and position embeddings, layers, and a decoder whose weights are the token embedding's.

    Input tokens (batch, time) int64, time at most `window`; output logits (batch, time, vocabulary) float32.

    Args:
        vocabulary: number of tokens.
        window: longest input.
        size: a name in SIZES.
        dropout: after the embedding, in the attention and behind each half of a layer.
    """

    def __init__(self, vocabulary: int, window: int, size: str = "gpt", dropout: float = 0.0) -> None:
        super().__init__()
        layers, width, heads = SIZES[size]
        self.window = window
        self.token, self.place = nn.Embedding(vocabulary, width), nn.Embedding(window, width)
        self.drop = nn.Dropout(dropout)
        self.layers = nn.ModuleList(Layer(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                last = name.endswith(
                    ("mix.weight", "narrow.weight")
                )  # what is added to the shortcut, twice a layer
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if last else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.drop(self.token(tokens) + self.place(places))
        for layer in self.layers:
            x = layer(x)
        return functional.linear(self.norm(x), self.token.weight)


@torch.no_grad()
def sample(model: GPT, start: Tensor, count: int, seed: int, temperature: float = 0.8) -> Tensor:
    """`count` tokens that follow `start`, drawn one by one; the model is left in its mode.

    Args:
        model: on any device.
        start: (n,) int64, n at least 1; only its last `window` tokens count.
        count: tokens to draw.
        seed: of the draws, which touch no global generator.
        temperature: divides the logits.

    Returns:
        (count,) int64 on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    device, training = model.token.weight.device, model.training
    model.eval()
    tokens = start.cpu()
    for _ in range(count):
        logits = model(tokens[-model.window :][None].to(device))[0, -1].float().cpu()
        chances = (logits / temperature).softmax(0)
        tokens = torch.cat((tokens, torch.multinomial(chances, 1, generator=generator)))
    model.train(training)
    return tokens[len(start) :]
