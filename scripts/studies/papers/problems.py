"""Small objectives whose stochastic gradients come for all repeats and workers at once.

Points have shape (R, P, n): R independent repeats of P workers. Data are scikit-learn's bundled sets.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import lru_cache

import torch
from torch import Tensor

DTYPE = torch.float64


class Problem(ABC):
    """An average of ``samples`` functions of a point with ``numel`` elements."""

    samples: int
    numel: int

    @abstractmethod
    def gradient(self, x: Tensor, rows: Tensor) -> Tensor:
        """Mean gradients (R, P, n) at x (R, P, n) over the samples ``rows`` (R, P, b) int64."""

    @abstractmethod
    def value(self, x: Tensor) -> Tensor:
        """The objective at x (..., n), shape (...)."""

    def full_gradient(self, x: Tensor) -> Tensor:
        """The exact gradient at x (R, n)."""
        rows = torch.arange(self.samples).expand(x.shape[0], 1, self.samples)
        return self.gradient(x[:, None], rows)[:, 0]

    def start(self, seed: int = 0) -> Tensor:
        """A starting point (n,)."""
        return torch.zeros(self.numel, dtype=DTYPE)


class Quadratic(Problem):
    """``x^T D x / 2`` with eigenvalues from 1 to ``condition`` and gradient noise N(0, sigma^2 I) per sample.

    ``rows`` seeds nothing here: noise is drawn from torch's generator given to the constructor.
    """

    def __init__(self, numel: int = 20, condition: float = 10.0, sigma: float = 1.0, seed: int = 0) -> None:
        self.numel, self.samples, self.sigma = numel, 1, sigma
        self.eigenvalues = torch.linspace(1.0, condition, numel, dtype=DTYPE)
        self.generator = torch.Generator().manual_seed(seed)
        self.strong_convexity, self.smoothness = 1.0, condition
        self.minimum = 0.0

    def gradient(self, x: Tensor, rows: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=self.generator, dtype=DTYPE)
        return x * self.eigenvalues + self.sigma / rows.shape[-1] ** 0.5 * noise

    def value(self, x: Tensor) -> Tensor:
        return (x.square() * self.eigenvalues).sum(dim=-1) / 2

    def start(self, seed: int = 0) -> Tensor:
        return torch.ones(self.numel, dtype=DTYPE)


class Logistic(Problem):
    """Logistic regression with L2 on the breast-cancer data (569 x 30, standardised, with a constant)."""

    def __init__(self, strength: float = 0.05) -> None:
        from sklearn.datasets import load_breast_cancer

        data = load_breast_cancer()
        a = torch.from_numpy(data.data).to(DTYPE)
        a = (a - a.mean(dim=0)) / a.std(dim=0)
        a = torch.cat([a, torch.ones(len(a), 1, dtype=DTYPE)], dim=1)
        signs = 2.0 * torch.from_numpy(data.target).to(DTYPE) - 1.0
        self.signed = a * signs[:, None]  # y_i a_i
        self.strength = strength
        self.samples, self.numel = self.signed.shape
        largest = float(torch.linalg.eigvalsh(a.T @ a / len(a))[-1])
        self.strong_convexity, self.smoothness = strength, largest / 4 + strength
        self.minimum = self._minimum() if strength > 0 else 0.0

    def gradient(self, x: Tensor, rows: Tensor) -> Tensor:
        a = self.signed[rows]  # (R, P, b, n)
        margins = torch.matmul(a, x[..., None])[..., 0]
        weights = -torch.sigmoid(-margins) / rows.shape[-1]
        return torch.matmul(weights[..., None, :], a)[..., 0, :] + self.strength * x

    def value(self, x: Tensor) -> Tensor:
        margins = x @ self.signed.T
        return torch.nn.functional.softplus(-margins).mean(dim=-1) + self.strength / 2 * x.square().sum(
            dim=-1
        )

    def _minimum(self) -> float:
        x = torch.zeros(self.numel, dtype=DTYPE)
        for _ in range(30):  # Newton
            s = torch.sigmoid(-(self.signed @ x))
            g = -(self.signed * s[:, None]).mean(dim=0) + self.strength * x
            h = (self.signed * (s * (1 - s))[:, None]).T @ self.signed / self.samples
            x = x - torch.linalg.solve(h + self.strength * torch.eye(self.numel, dtype=DTYPE), g)
        return float(self.value(x))


@lru_cache(maxsize=1)
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images (1437, 64) in [-0.5, 0.5] and labels, and the 360 of the test, shuffled once."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(data.data)[order].to(DTYPE) / 16.0 - 0.5
    labels = torch.from_numpy(data.target)[order]
    return images[:1437], labels[:1437], images[1437:], labels[1437:]


class DigitsMLP(Problem):
    """A 64-h-10 perceptron with tanh on the digits: smooth and not convex. ``hidden=0``: softmax regression.

    With ``strength`` > 0 an L2 term is added, which makes softmax regression strongly convex.
    """

    def __init__(self, hidden: int = 24, strength: float = 0.0) -> None:
        self.hidden, self.strength = hidden, strength
        self.images, self.labels, self.test_images, self.test_labels = digits()
        self.samples = len(self.labels)
        self.shapes = [(64, hidden), (hidden,), (hidden, 10), (10,)] if hidden else [(64, 10), (10,)]
        self.numel = sum(torch.Size(s).numel() for s in self.shapes)

    def start(self, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(100 + seed)
        parts = []
        for shape in self.shapes:
            part = torch.zeros(shape, dtype=DTYPE)
            if len(shape) == 2 and self.hidden:
                part = torch.randn(shape, generator=generator, dtype=DTYPE) / shape[0] ** 0.5
            parts.append(part.reshape(-1))
        return torch.cat(parts)

    def _parts(self, x: Tensor) -> list[Tensor]:
        sizes = [torch.Size(s).numel() for s in self.shapes]
        return [
            part.reshape(*x.shape[:-1], *s)
            for part, s in zip(x.split(sizes, dim=-1), self.shapes, strict=True)
        ]

    def _logits(self, x: Tensor, images: Tensor) -> Tensor:
        w1, b1, *rest = self._parts(x)
        first = images @ w1 + b1[..., None, :]
        return torch.tanh(first) @ rest[0] + rest[1][..., None, :] if self.hidden else first

    def gradient(self, x: Tensor, rows: Tensor) -> Tensor:
        images, labels = self.images[rows], self.labels[rows]
        w1, b1, *rest = self._parts(x)
        first = images @ w1 + b1[..., None, :]
        h = torch.tanh(first) if self.hidden else first
        logits = h @ rest[0] + rest[1][..., None, :] if self.hidden else first
        d = torch.softmax(logits, dim=-1)
        d.scatter_add_(-1, labels[..., None], -torch.ones_like(labels, dtype=DTYPE)[..., None])
        d /= rows.shape[-1]
        if self.hidden:
            below = (d @ rest[0].mT) * (1 - h.square())
            parts = [images.mT @ below, below.sum(dim=-2), h.mT @ d, d.sum(dim=-2)]
        else:
            parts = [images.mT @ d, d.sum(dim=-2)]
        flat = torch.cat([p.reshape(*x.shape[:-1], -1) for p in parts], dim=-1)
        return flat + self.strength * x if self.strength else flat

    def value(self, x: Tensor) -> Tensor:
        losses = []
        for row in x.reshape(-1, self.numel):
            loss = torch.nn.functional.cross_entropy(self._logits(row, self.images), self.labels)
            losses.append(loss + self.strength / 2 * row.square().sum())
        return torch.stack(losses).reshape(x.shape[:-1])

    def accuracy(self, x: Tensor) -> Tensor:
        """Share of the test images classified rightly, for x (R, n)."""
        logits = self._logits(x, self.test_images)
        return (logits.argmax(dim=-1) == self.test_labels).to(DTYPE).mean(dim=-1)


class LeastAbsolute(Problem):
    """``mean |a_i^T w - b_i|`` with Gaussian data and heavy noise: convex, neither smooth nor strongly convex."""

    def __init__(self, numel: int = 20, samples: int = 400, noise: float = 2.0, seed: int = 0) -> None:
        from scipy.optimize import linprog

        generator = torch.Generator().manual_seed(seed)
        self.numel, self.samples = numel, samples
        self.a = torch.randn(samples, numel, generator=generator, dtype=DTYPE) / numel**0.5
        truth = torch.randn(numel, generator=generator, dtype=DTYPE)
        self.b = self.a @ truth + noise * torch.randn(samples, generator=generator, dtype=DTYPE)
        ones, zeros = torch.ones(samples, dtype=DTYPE), torch.zeros(numel, dtype=DTYPE)
        slack = torch.eye(samples, dtype=DTYPE)
        upper = torch.cat([torch.cat([self.a, -slack], dim=1), torch.cat([-self.a, -slack], dim=1)])
        found = linprog(torch.cat([zeros, ones]), upper, torch.cat([self.b, -self.b]), bounds=(None, None))
        self.minimum = float(found.fun) / samples

    def gradient(self, x: Tensor, rows: Tensor) -> Tensor:
        a, b = self.a[rows], self.b[rows]
        signs = torch.sign(torch.matmul(a, x[..., None])[..., 0] - b) / rows.shape[-1]
        return torch.matmul(signs[..., None, :], a)[..., 0, :]

    def value(self, x: Tensor) -> Tensor:
        return (x @ self.a.T - self.b).abs().mean(dim=-1)


class PhaseRetrieval(Problem):
    """``mean |(a_i^T w)^2 - b_i|``: neither convex nor smooth, weakly convex with ``c = 2 lambda_max(A^T A / N)``."""

    def __init__(self, numel: int = 20, samples: int = 400, noise: float = 0.05, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.numel, self.samples = numel, samples
        self.a = torch.randn(samples, numel, generator=generator, dtype=DTYPE)
        self.truth = torch.randn(numel, generator=generator, dtype=DTYPE) / numel**0.5
        self.b = (self.a @ self.truth).square() + noise * torch.randn(
            samples, generator=generator, dtype=DTYPE
        )
        self.weak_convexity = 2 * float(torch.linalg.eigvalsh(self.a.T @ self.a / samples)[-1])

    def gradient(self, x: Tensor, rows: Tensor) -> Tensor:
        a, b = self.a[rows], self.b[rows]
        products = torch.matmul(a, x[..., None])[..., 0]
        weights = 2 * torch.sign(products.square() - b) * products / rows.shape[-1]
        return torch.matmul(weights[..., None, :], a)[..., 0, :]

    def value(self, x: Tensor) -> Tensor:
        return ((x @ self.a.T).square() - self.b).abs().mean(dim=-1)

    def start(self, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(7 + seed)
        return self.truth + torch.randn(self.numel, generator=generator, dtype=DTYPE) / self.numel**0.5
