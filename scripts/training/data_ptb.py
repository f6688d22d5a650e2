"""Penn Treebank from a local folder in Mikolov's published form: ptb.train.txt, ptb.valid.txt, ptb.test.txt.

One sentence a line, words separated by blanks, rare words already written as <unk>; a line's end becomes <eos>.
"""

from __future__ import annotations

from pathlib import Path

from .data_text import Corpus, build_vocabulary, encode

END = "<eos>"
TRAIN, VALID, TEST = "ptb.train.txt", "ptb.valid.txt", "ptb.test.txt"


def load(folder: Path, evaluate_on: str = TEST) -> Corpus:
    """The training stream and the stream to evaluate on, numbered by the training set's vocabulary.

    Raises:
        ValueError: a file is missing or empty.
    """
    inner = folder / "data"
    place = inner if (inner / TRAIN).is_file() else folder
    missing = [name for name in (TRAIN, VALID, TEST) if not (place / name).is_file()]
    if missing:
        raise ValueError(f"{place} does not hold PTB: {', '.join(missing)} missing")
    train, test = read(place / TRAIN), read(place / evaluate_on)
    vocabulary = build_vocabulary(train, len(set(train)) + 1)
    return Corpus(encode(train, vocabulary), encode(test, vocabulary), vocabulary)


def read(path: Path) -> list[str]:
    """The words of a file, each line closed by <eos>."""
    words: list[str] = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            words.extend(line.split())
            words.append(END)
    if not words:
        raise ValueError(f"{path} is empty")
    return words
