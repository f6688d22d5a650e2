"""The message in which consecutive elements are sent in few bits each: a header, flags, scales and codes.

The header is that of :mod:`.message`; its count is the number of elements of the whole vector. The flags say,
a byte for each parameter, whether the sender has a gradient of it; they are padded to whole words. Scales and
codes are those of :func:`commhooks.native.ops.low_bit_encode`. With 32 bits the elements themselves follow
instead, and with 16 bits the elements rounded to bfloat16, both without scales. The size of a message follows
from the numbers of elements and parameters alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..gradient.sparse_grad import HEADER_WORDS
from ..native import checks, ops
from .message import HEADER_BYTES, Context, header_of, read_header

BITS = (1, 2, 4, 8, 16, 32)
BFLOAT16, LOSSLESS = 16, 32
BLOCK = checks.LOW_BIT_BLOCK
"""Consecutive elements that share a scale. A chunk has whole blocks."""


def chunks(numel: int, world_size: int) -> list[tuple[int, int]]:
    """Returns where each rank's chunk of a vector of ``numel`` elements begins and ends, in rank order.

    A chunk holds whole blocks, so that the codes of a vector do not depend on the number of ranks. Chunks
    differ by one block at most. With fewer blocks than ranks some are empty.
    """
    blocks = -(-numel // BLOCK)
    ends = [min(numel, blocks * r // world_size * BLOCK) for r in range(world_size + 1)]
    return list(zip(ends[:-1], ends[1:], strict=True))


def head_bytes(parameters: int) -> int:
    """Returns the bytes before the codes in a message with flags of so many ``parameters``."""
    return HEADER_BYTES + -(-parameters // 4) * 4


def code_bytes(numel: int, bits: int) -> int:
    """Returns the bytes of scales and codes of ``numel`` elements."""
    if bits == BFLOAT16:
        return -(-numel // 2) * 4  # whole words
    return 4 * numel if bits == LOSSLESS else ops.low_bit_size(numel, bits)


def encode(values: Tensor, bits: int, out: Tensor) -> None:
    """Overwrites ``out`` with the codes of ``values``, and ``values`` with what the codes do not hold.

    Args:
        values: shape ``(n,)``, float32. What bfloat16 does not hold of a finite element is exact in float32.
            A finite element beyond bfloat16's range becomes the largest number that bfloat16 has.
        bits: one of :data:`BITS`.
        out: shape ``(code_bytes(n, bits),)``, uint8.
    """
    if bits == LOSSLESS:
        out.view(torch.float32).copy_(values)
        values.zero_()
    elif bits == BFLOAT16:
        codes = _halves(out, values.numel())
        codes.copy_(_within_bfloat16(values))
        values.sub_(codes)
    else:
        ops.low_bit_encode(values, bits, out, values)


def is_finite(codes: Tensor, numel: int, bits: int) -> bool:
    """Whether the ``numel`` elements that ``codes`` were made of are finite. The host waits for the device.

    Where there are scales, only they are read: a block with an element that is not finite has scale NaN.
    """
    if bits == LOSSLESS:
        return bool(codes.view(torch.float32).isfinite().all())
    if bits == BFLOAT16:
        return bool(_halves(codes, numel).isfinite().all())
    scales = codes[: 2 * -(-numel // BLOCK)].view(torch.bfloat16)
    return not bool(scales.isnan().any())


def decode(codes: Tensor, bits: int, out: Tensor) -> None:
    """Overwrites ``out`` ``(n,)`` with the values of ``codes`` ``(code_bytes(n, bits),)``."""
    if bits == LOSSLESS:
        out.copy_(codes.view(torch.float32))
    elif bits == BFLOAT16:
        out.copy_(_halves(codes, out.numel()))
    else:
        ops.low_bit_decode(codes, bits, out)


def decode_add(codes: Tensor, bits: int, out: Tensor) -> None:
    """Adds the values of ``codes`` to ``out``, row after row.

    Args:
        codes: shape ``(rows, code_bytes(n, bits))``, uint8; each row is contiguous.
        bits: one of :data:`BITS`.
        out: shape ``(n,)``, float32; changed in place.
    """
    if bits == LOSSLESS:
        for row in codes.view(torch.float32):
            out += row
    elif bits == BFLOAT16:
        for row in codes:
            out += _halves(row, out.numel())
    else:
        ops.low_bit_decode_add(codes, bits, out)


def _within_bfloat16(values: Tensor) -> Tensor:
    """``values`` ``(n,)`` with finite elements beyond bfloat16's range replaced by the range's end."""
    largest = torch.finfo(torch.bfloat16).max
    if values.device.type == "cpu" and values.numel():  # a GPU would have to be waited for
        low, high = values.aminmax()
        if -largest <= float(low) and float(high) <= largest:  # false where there is a NaN
            return values
    return torch.where(values.isfinite(), values.clamp(-largest, largest), values)


def _halves(codes: Tensor, numel: int) -> Tensor:
    """The ``numel`` elements in 16-bit codes, as a bfloat16 view."""
    return codes[: 2 * numel].view(torch.bfloat16)


def write_head(
    message: Tensor, context: Context, nonfinite: bool, numel: int, flags: Tensor | None = None
) -> None:
    """Writes header and flags into a message.

    Args:
        message: shape ``(head_bytes(parameters) + ...,)``, uint8.
        context: which exchange this is.
        nonfinite: this rank's vote.
        numel: elements of the whole vector.
        flags: bool ``(parameters,)``. None: there are none.
    """
    message[:HEADER_BYTES] = header_of(context, nonfinite, numel).view(torch.uint8)
    if flags is not None:
        message[HEADER_BYTES : HEADER_BYTES + flags.numel()] = flags


def read_heads(
    messages: Tensor, context: Context, numel: int, parameters: int = 0
) -> tuple[bool, Sequence[bool]]:
    """Reads the ranks' headers and flags. The host waits for the device once.

    Args:
        messages: shape ``(P, size)``, uint8, in rank order.
        context: which exchange this is.
        numel: elements of the whole vector.
        parameters: number of flags.

    Returns:
        Whether any rank voted non-finite; and for each flag whether any rank set it.

    Raises:
        SettingsMismatchError: a message is of another exchange or of another number of elements.
    """
    heads = messages[:, : HEADER_BYTES + parameters].cpu()
    headers = heads[:, :HEADER_BYTES].reshape(-1).view(torch.int32).view(-1, HEADER_WORDS).tolist()
    votes = [
        read_header(header, numel, rank, context, "elements", "sizes") for rank, header in enumerate(headers)
    ]
    return any(votes), heads[:, HEADER_BYTES:].any(0).tolist()
