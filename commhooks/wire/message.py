"""The one message in which pairs travel: a header, k indices, k values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SettingsMismatchError
from ..gradient.sparse_grad import SparseGrad

HEADER_WORDS = 4
HEADER_BYTES = 4 * HEADER_WORDS
ROUNDS_PER_BUCKET = 32
_MAGIC = 0x436F4B31
_TAGS = 32768 // ROUNDS_PER_BUCKET


@dataclass(frozen=True)
class Context:
    """Which exchange this is: the same on all ranks."""

    bucket: int
    step: int

    @property
    def tag(self) -> int:
        """First of ``ROUNDS_PER_BUCKET`` message tags."""
        return self.bucket % _TAGS * ROUNDS_PER_BUCKET

    def __str__(self) -> str:
        return f"bucket {self.bucket}, step {self.step}"


def pack(pairs: SparseGrad, nonfinite: bool, context: Context) -> Tensor:
    """One int32 message: header (magic, bucket, step, vote), then k indices, then the k values' bits."""
    message = pairs.indices.new_empty(HEADER_WORDS + 2 * pairs.k)
    message[:HEADER_WORDS] = torch.tensor([_MAGIC, context.bucket, context.step & 0x7FFFFFFF, int(nonfinite)])
    message[HEADER_WORDS : HEADER_WORDS + pairs.k] = pairs.indices
    message[HEADER_WORDS + pairs.k :] = pairs.values.view(torch.int32)
    return message


def unpack(message: Tensor, numel: int, sender: int, context: Context) -> tuple[SparseGrad, bool]:
    """The pairs and the vote of a message made by :func:`pack`.

    Raises:
        SettingsMismatchError: the message belongs to another bucket or step.
    """
    magic, bucket, step, vote = message[:HEADER_WORDS].tolist()
    if (magic, bucket, step) != (_MAGIC, context.bucket, context.step & 0x7FFFFFFF):
        raise SettingsMismatchError(
            f"expected {context} from rank {sender}, got bucket {bucket}, step {step} (mark {magic:#x}): "
            "the ranks are out of step"
        )
    k = (message.numel() - HEADER_WORDS) // 2
    indices = message[HEADER_WORDS : HEADER_WORDS + k]
    values = message[HEADER_WORDS + k :].view(torch.float32)
    return SparseGrad(values, indices, numel), bool(vote)


def empty_message(k: int, device: torch.device) -> Tensor:
    """Where a message of ``k`` pairs is received."""
    return torch.empty(HEADER_WORDS + 2 * k, dtype=torch.int32, device=device)
