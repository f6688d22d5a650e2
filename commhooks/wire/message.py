"""The message in which pairs are sent: a header of four words, k indices, k values, all as int32 words.

The header's words are k combined with a constant mark, the bucket, the step, and the number of pairs that the
sender will send of this bucket at the next step. The sign bit of the step's word is the sender's vote, which
says whether its gradient held NaN or Inf.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import SettingsMismatchError
from ..gradient.sparse_grad import HEADER_WORDS, SparseGrad, empty_message, places
from ..native.fused import PAD

HEADER_BYTES = 4 * HEADER_WORDS
ROUNDS_PER_BUCKET = 32
"""Message tags of one exchange: 0 to 15 are rounds, 16 to 30 are waits before a round, 31 brings a result.

Settings are compared under tag 30, before the exchange begins.
"""
_TAGS = 32768 // ROUNDS_PER_BUCKET  # buckets with tags of their own; MPI promises tags up to 32767
_MARK = 0x436F4B32  # an arbitrary number: another program's message does not have it in this place
_STEP_BITS = 0x7FFFFFFF
_VOTE = -0x80000000  # the sign bit of an int32
RETURNED = -2
"""In place of the next step's number of pairs: the sender was reset or loaded since the last step."""


class OutOfStepError(SettingsMismatchError):
    """A message has the expected size, but is of another step or announces another size for the next one.

    The exchange can go on, so that all ranks notice it and the ranks can compare their contexts.

    Attributes:
        theirs: the sender's context.
    """

    def __init__(self, text: str, theirs: Context) -> None:
        super().__init__(text)
        self.theirs = theirs


class Context(NamedTuple):
    """Identifies one exchange. It is the same on all ranks.

    Attributes:
        bucket: the bucket's index.
        step: the step.
        next_k: the number of pairs of the bucket at the next step, or :data:`RETURNED`. The ranks compare it
            one step ahead, since transports fail on messages of unequal sizes.
    """

    bucket: int
    step: int
    next_k: int = 0

    @property
    def tag(self) -> int:
        """The first of the exchange's :data:`ROUNDS_PER_BUCKET` message tags."""
        return self.bucket % _TAGS * ROUNDS_PER_BUCKET

    def announcing(self, next_k: int) -> Context:
        """The same exchange with another number of pairs at the next step."""
        return Context(self.bucket, self.step, next_k)

    def __str__(self) -> str:
        return f"bucket {self.bucket}, step {self.step}"


def pack(pairs: SparseGrad, nonfinite: bool, context: Context) -> Tensor:
    """Makes the message of pairs: the one that they are in, else a new one on their device.

    Args:
        pairs: k pairs. Where they are in a message, only its header is written.
        nonfinite: the vote: whether this rank's gradient held NaN or Inf.
        context: which exchange this is.

    Returns:
        Shape ``(HEADER_WORDS + 2 k,)``, int32: header, indices, the values' bits.
    """
    message = pairs.message
    if message is None:
        message = empty_message(pairs.k, pairs.indices.device)
        values, indices = places(message)
        values.copy_(pairs.values)
        indices.copy_(pairs.indices)
    message[:HEADER_WORDS] = header_of(context, nonfinite, pairs.k)
    return message


def unpack(message: Tensor, numel: int, sender: int, context: Context) -> tuple[SparseGrad, bool]:
    """Returns the pairs and the vote of a message made by :func:`pack`. The host waits for the device.

    Args:
        message: shape ``(HEADER_WORDS + 2 k,)``, int32. The pairs are views of it.
        numel: elements of the bucket.
        sender: the sender's rank, for the error.
        context: which exchange this is.

    Raises:
        SettingsMismatchError: the message is of another bucket or step or holds another number of pairs, or
            the sender announces another number for the next step; or an index is out of place.
            ``OutOfStepError`` where only the step or the announced number differs. On a GPU indices are not
            checked here, since that would wait; the kernels leave out those that are out of range.
    """
    values, indices = places(message)
    vote = read_header(message[:HEADER_WORDS].tolist(), values.numel(), sender, context)
    _check_indices(indices[None], numel, [sender], context)
    return SparseGrad(values, indices, numel), vote


def unpack_all(messages: Tensor, numel: int, context: Context) -> tuple[Tensor, Tensor, bool]:
    """Returns values and indices of all ranks' messages, and whether any rank voted non-finite.

    The host waits for the device once.

    Args:
        messages: shape ``(P, HEADER_WORDS + 2 k)``, int32, in rank order.
        numel: elements of the bucket.
        context: which exchange this is.

    Returns:
        Values ``(P, k)`` float32 and indices ``(P, k)`` int32, views of ``messages``; the vote.

    Raises:
        SettingsMismatchError: as :func:`unpack`.
    """
    k = (messages.shape[1] - HEADER_WORDS) // 2
    headers = messages[:, :HEADER_WORDS].tolist()
    votes = [read_header(header, k, rank, context) for rank, header in enumerate(headers)]
    indices = messages[:, HEADER_WORDS : HEADER_WORDS + k]
    values = messages[:, HEADER_WORDS + k :].view(torch.float32)
    _check_indices(indices, numel, range(len(messages)), context)
    return values, indices, any(votes)


def header_of(context: Context, nonfinite: bool, count: int) -> Tensor:
    """Returns a message's header: int32 ``(HEADER_WORDS,)``, on the CPU.

    Args:
        context: which exchange this is.
        nonfinite: the sender's vote.
        count: how many pairs or elements the message is for.
    """
    step = context.step & _STEP_BITS
    words = [_MARK ^ count, context.bucket, step | _VOTE if nonfinite else step, context.next_k]
    return torch.tensor(words, dtype=torch.int32, device="cpu")


def read_header(
    header: list[int],
    count: int,
    sender: int,
    context: Context,
    unit: str = "pairs",
    setting: str = "densities",
) -> bool:
    """Returns the vote in a header of :func:`header_of`.

    Raises:
        SettingsMismatchError: the header is of another exchange than ``context``, or of another ``count``
            (the text names the ``unit`` of the count, and the ``setting`` that differs), or announces another
            number of pairs for the next step. ``OutOfStepError`` where bucket and ``count`` are the expected
            ones.
    """
    marked, bucket, step, next_k = header
    theirs = Context(bucket, step & _STEP_BITS, next_k)
    if (bucket, theirs.step) != (context.bucket, context.step & _STEP_BITS):
        text = f"expected {context} from rank {sender}, got {theirs}: the ranks are out of step"
        if bucket == context.bucket and marked == _MARK ^ count:
            raise OutOfStepError(text, theirs)
        raise SettingsMismatchError(text)
    if marked != _MARK ^ count:
        raise SettingsMismatchError(
            f"{context}: expected {count} {unit} from rank {sender}, got a message of {marked ^ _MARK}: the "
            f"ranks' {setting} differ"
        )
    if next_k != context.next_k:
        raise OutOfStepError(
            f"{context}: at the next step {context.next_k} pairs here, rank {sender} announces {next_k}: the "
            "ranks' densities differ",
            theirs,
        )
    return step < 0


def _check_indices(rows: Tensor, numel: int, senders: Sequence[int], context: Context) -> None:
    """Raises unless every row ascends within ``[0, numel)`` and ends with the padding."""
    if rows.device.type != "cpu" or not rows.numel():
        return
    ascend = (rows[:, 1:] > rows[:, :-1]) | (rows[:, 1:] == PAD)
    good = ascend.all(1) & (rows[:, 0] >= 0) & ((rows < numel) | (rows == PAD)).all(1)
    if not bool(good.all()):
        sender = senders[int(good.logical_not().nonzero()[0])]
        raise SettingsMismatchError(
            f"{context}: rank {sender} sent indices that do not ascend below {numel}: the message is damaged "
            "or of another program"
        )
