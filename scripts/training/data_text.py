"""Real text that every machine has: the Python standard library's own sources, by byte, character or word.

Files are read in sorted order, the last tenth of each goes to the test set; the vocabulary is the training set's, most frequent first
and then in the order of the code points, so it is the same wherever the interpreter is.
"""

from __future__ import annotations

import re
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable, Sequence

import torch
from torch import Tensor

UNKNOWN = "<unk>"
LEVELS = ("byte", "char", "word")
# identifiers, numbers, runs of spaces, line ends, and every other character by itself
WORD = re.compile(r"[^\W\d]\w*|\d+|[ \t]+|\n|[^\w\s]|\s")


BYTES = tuple(f"0x{byte:02x}" for byte in range(256))
"""The vocabulary of bytes."""


@dataclass(frozen=True)
class Corpus:
    """Two streams of tokens, int64 numbers below `len(vocabulary)`."""

    train: Tensor
    test: Tensor
    vocabulary: tuple[str, ...]

    @property
    def vocabulary_size(self) -> int:
        return len(self.vocabulary)

    def text(self, tokens: Tensor) -> str:
        """The text that tokens (n,) stand for; what is unknown, or no UTF-8, becomes the replacement character."""
        if self.vocabulary == BYTES:
            return bytes(tokens.tolist()).decode("utf-8", errors="replace")
        return "".join(self.vocabulary[token] for token in tokens.tolist()).replace(UNKNOWN, "\ufffd")


def sources() -> list[Path]:
    """The modules at the top of the standard library's folder, sorted by name."""
    return sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"), key=lambda path: path.name)


def load(
    level: str = "char", size: int = 1_000_000, vocabulary: int = 2000, files: Sequence[Path] | None = None
) -> Corpus:
    """Read about `size` characters and number their tokens.

    Args:
        level: "byte" (all 256 are tokens), "char" or "word".
        size: most characters read, training and test together.
        vocabulary: most tokens kept, the unknown one included; the rest becomes "<unk>".
        files: other files to read, in this order.

    Raises:
        ValueError: unknown level, a size or vocabulary too small, or no sources on this machine.
    """
    if level not in LEVELS:
        raise ValueError(f"level={level!r} is none of {LEVELS}")
    if vocabulary < 2:
        raise ValueError(f"vocabulary={vocabulary} is below 2")
    if size < 1000:
        raise ValueError(f"size={size} is below 1000 characters")
    if level == "byte":
        return _bytes(size, files if files is not None else sources())
    train: list[str] = []
    test: list[str] = []
    left = size
    for path in files if files is not None else sources():
        text = path.read_text(encoding="utf-8", errors="replace")[:left]
        left -= len(text)
        tokens = split(text, level)
        cut = len(tokens) - len(tokens) // 10
        train += tokens[:cut]
        test += tokens[cut:]
        if left == 0:
            break
    if not test:
        raise ValueError("no Python sources found on this machine")
    words = build_vocabulary(train, vocabulary)
    return Corpus(encode(train, words), encode(test, words), words)


def _bytes(size: int, files: Sequence[Path]) -> Corpus:
    """About `size` bytes of the files, the last tenth of each to the test set."""
    train, test, left = bytearray(), bytearray(), size
    for path in files:
        content = path.read_bytes()[:left]
        left -= len(content)
        cut = len(content) - len(content) // 10
        train += content[:cut]
        test += content[cut:]
        if left == 0:
            break
    if not test:
        raise ValueError(f"no text found in {len(files)} files")
    numbers = [torch.frombuffer(part, dtype=torch.uint8).long() for part in (train, test)]
    return Corpus(*numbers, BYTES)


def split(text: str, level: str) -> list[str]:
    """The tokens of a text; joined they give the text again."""
    return list(text) if level == "char" else WORD.findall(text)


def build_vocabulary(tokens: Iterable[str], most: int) -> tuple[str, ...]:
    """The unknown token, then the `most - 1` most frequent ones; ties in the order of the code points."""
    counts = Counter(tokens)
    counts.pop(UNKNOWN, None)
    frequent = sorted(counts, key=lambda token: (-counts[token], token))
    return (UNKNOWN, *frequent[: most - 1])


def encode(tokens: Iterable[str], vocabulary: Sequence[str]) -> Tensor:
    """Numbers of the tokens (N,) int64; 0 for those outside the vocabulary."""
    numbers = {token: number for number, token in enumerate(vocabulary)}
    unknown = numbers[UNKNOWN]
    return torch.tensor([numbers.get(token, unknown) for token in tokens], dtype=torch.int64)
