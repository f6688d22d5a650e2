"""CIFAR-10 from a local folder in the published "python version": pickled batches data_batch_1..5 and test_batch.

Each batch is a pickled dictionary with `data` (N, 3072) uint8, row-wise red, green, blue planes of 32x32, and `labels`.
A pickle can run code, so only what numpy arrays need is allowed.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from .data_digits import Arrays

TRAIN_FILES = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST_FILE = "test_batch"
FOLDER = "cifar-10-batches-py"
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)
_ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.numeric", "_frombuffer"),
    ("numpy.core.numeric", "_frombuffer"),
    ("_codecs", "encode"),
}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"a CIFAR-10 batch does not need {module}.{name}")
        return super().find_class(module, name)


def read_batch(path: Path) -> tuple[Tensor, Tensor]:
    """One file: images (N, 3, 32, 32) uint8 and labels (N,) int64.

    Raises:
        ValueError: the file is not a batch in the published format.
    """
    try:
        with path.open("rb") as file:
            content = _ArraysOnly(file, encoding="bytes").load()
        data, labels = numpy.asarray(content[b"data"]), content[b"labels"]
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path} is not a CIFAR-10 batch of the python version: {error!r}") from error
    if data.dtype != numpy.uint8 or data.ndim != 2 or data.shape[1] != 3072 or len(labels) != len(data):
        raise ValueError(
            f"{path}: expected data (N, 3072) uint8 with N labels, got {data.shape} {data.dtype} with {len(labels)}"
        )
    images = torch.from_numpy(data.copy()).view(-1, 3, 32, 32)
    targets = torch.tensor(labels, dtype=torch.int64)
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) <= 9:
        raise ValueError(f"{path}: labels outside 0..9")
    return images, targets


def load(folder: Path) -> Arrays:
    """All batches in `folder` (or in its cifar-10-batches-py); absent training batches are an error.

    Raises:
        ValueError: the folder does not hold the six files, or one of them is not in the format.
    """
    inner = folder / FOLDER
    place = inner if inner.is_dir() else folder
    missing = [name for name in (*TRAIN_FILES, TEST_FILE) if not (place / name).is_file()]
    if missing:
        raise ValueError(f"{place} does not hold CIFAR-10 (python version): {', '.join(missing)} missing")
    parts = [read_batch(place / name) for name in TRAIN_FILES]
    train_x = torch.cat([x for x, _ in parts])
    train_y = torch.cat([y for _, y in parts])
    test_x, test_y = read_batch(place / TEST_FILE)
    return Arrays(normalise(train_x), train_y, normalise(test_x), test_y, augment=True)


def normalise(images: Tensor) -> Tensor:
    """(N, 3, 32, 32) uint8 -> float32, each channel by the mean and deviation of the training set."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (images.float() / 255 - mean) / std


def crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image (C, H, W) padded by 4 zeros, cut out again at a random place, and mirrored half the time."""
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    shifts = torch.randint(0, 9, (count, 2), generator=generator)
    flips = torch.rand(count, generator=generator) < 0.5
    rows = shifts[:, :1] + torch.arange(height)
    columns = shifts[:, 1:] + torch.arange(width)
    columns = torch.where(flips[:, None], columns.flip(1), columns)
    each = torch.arange(count)[:, None, None]
    return padded[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
