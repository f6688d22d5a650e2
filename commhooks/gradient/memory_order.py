"""The order in which a bucket holds a parameter's elements: that of the parameter's memory.

DDP lays its buckets out like this. For a parameter in ``torch.channels_last`` the order differs from that of
the indices. For a contiguous parameter the two are the same. A parameter whose memory has gaps is laid out by
its indices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def flattened(tensor: Any, parameter: Tensor) -> Tensor:
    """Returns the elements of ``tensor``, shape ``(n,)``, in the order of the parameter's memory.

    The result is a view where ``tensor`` lies in that order, and else a copy.

    Args:
        tensor: of the parameter's shape, such as its gradient or the parameter itself.
        parameter: whose order counts.
    """
    if not has_other_order(parameter):
        flat: Tensor = tensor.reshape(-1)
        return flat
    if tensor.stride() != parameter.stride():
        tensor = torch.empty_like(parameter, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
    view: Tensor = tensor.as_strided((tensor.numel(),), (1,))
    return view


def shaped(segment: Tensor, parameter: Tensor) -> Tensor:
    """Returns a view of ``segment`` (n,), which has the order of the parameter's memory, in its shape."""
    if not has_other_order(parameter):
        return segment.view(parameter.shape)
    return segment.as_strided(parameter.shape, parameter.stride(), segment.storage_offset())


def has_other_order(parameter: Tensor) -> bool:
    """Whether the elements lie without gaps, and in another order than that of their indices."""
    if parameter.is_contiguous():
        return False
    # The distance from the first element to the last. Elements of a parameter never overlap.
    steps = zip(parameter.shape, parameter.stride(), strict=True)
    return sum((size - 1) * stride for size, stride in steps) + 1 == parameter.numel()
