"""scikit-learn's bundled digits: 1797 images of 8x8 pixels, no download (UCI "Optical Recognition of Digits")."""

from __future__ import annotations

from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

TEST_EXAMPLES = 360


@dataclass(frozen=True)
class Arrays:
    """Images (N, channels, height, width) float32 of about zero mean and unit variance; labels (N,) int64."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    augment: bool = False  # random crops and flips of the training images


def load() -> Arrays:
    """1437 training and 360 test images; the split is always the same, whatever the seed of the run."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = numpy.random.RandomState(0).permutation(len(digits.target))
    x = torch.from_numpy(digits.images[order]).float().unsqueeze(1)
    y = torch.from_numpy(digits.target[order].astype(numpy.int64))
    train = len(y) - TEST_EXAMPLES
    x = (x - x[:train].mean()) / x[:train].std()
    return Arrays(x[:train], y[:train], x[train:], y[train:])
