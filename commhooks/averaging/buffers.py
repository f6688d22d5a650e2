"""A module's buffers: which of them are averaged or broadcast, and an exact mean of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from .flat import real_view, shown_layout, split

BufferChoice = Literal["average", "broadcast", "leave"]
_HIGH_BITS = ~((1 << 26) - 1)  # of a float64: the upper half of its mantissa
_WIDE = (torch.float64, torch.complex128)

Total = Callable[[Tensor], Tensor]
"""Sums a float64 tensor over the ranks; the argument is overwritten."""


class Buffers:
    """Finds the persistent buffers of a module: those that its ``state_dict`` holds.

    Non-persistent buffers are left alone. They are masks, tables and caches that each rank makes for itself,
    and a cache may have another size on another rank.

    Args:
        module: the model. None: there are no buffers.
        choice: ``"average"`` takes the floating and complex ones, ``"broadcast"`` all, ``"leave"`` none.

    Raises:
        ValueError: another choice.
    """

    def __init__(self, module: torch.nn.Module | None, choice: BufferChoice) -> None:
        if choice not in ("average", "broadcast", "leave"):
            raise ValueError(f"buffers must be 'average', 'broadcast' or 'leave', got {choice!r}")
        self.module, self.choice = module, choice

    def persistent(self) -> dict[str, Tensor]:
        """Returns the persistent strided buffers by name, in module order. None with ``"leave"``."""
        if self.module is None or self.choice == "leave":
            return {}
        temporary: set[str] = set()
        for prefix, part in self.module.named_modules():
            names = getattr(part, "_non_persistent_buffers_set", ())
            temporary.update(f"{prefix}.{name}" if prefix else name for name in names)
        found = {n: b for n, b in self.module.named_buffers() if n not in temporary}
        return {n: b for n, b in found.items() if b is not None and b.layout == torch.strided}

    def averaged(self) -> list[Tensor]:
        """Returns writable views of what is averaged. Of an expanded buffer it has the elements in memory."""
        if self.choice != "average":
            return []
        kept = (b for b in self.persistent().values() if b.is_floating_point() or b.is_complex())
        return [_in_memory(buffer) for buffer in kept]

    def broadcast(self) -> list[Tensor]:
        """Returns the buffers that become rank 0's at each averaging, as writable views."""
        return [_in_memory(b) for b in self.persistent().values()] if self.choice == "broadcast" else []

    def layout(self) -> str:
        """Returns choice, names and shapes, which must be the same on all ranks, as text."""
        named = self.persistent()
        return f"{self.choice}: {', '.join(named)}; {shown_layout(list(named.values()))}"


def _in_memory(buffer: Tensor) -> Tensor:
    """Returns a view without the dimensions by which ``expand`` repeats elements."""
    for dimension, (size, stride) in enumerate(zip(buffer.shape, buffer.stride(), strict=True)):
        if stride == 0 and size > 1:
            buffer = buffer.narrow(dimension, 0, 1)
    return buffer


def has_nonfinite(tensors: Sequence[Tensor]) -> bool:
    """Whether NaN or Inf is among the elements."""
    return not all(bool(real_view(tensor).isfinite().all()) for tensor in tensors)


def average_exactly(
    tensors: Sequence[Tensor], total: Total, world_size: int, share: float | None, nonfinite: bool
) -> None:
    """Makes each element its mean over the ranks, or ``sum_p share_p x_p`` where shares are given.

    Sums are made in float64, those of 64-bit tensors in two halves. So elements that are equal on all ranks
    keep their bits (64-bit ones only in a plain mean). No sum overflows, not even that of a mask of the
    largest finite number.

    Args:
        tensors: overwritten.
        total: the sum over the ranks.
        world_size: P.
        share: this rank's share, where the ranks' add up to 1. None: 1 / P each.
        nonfinite: whether any rank has NaN or Inf among its elements. An element is then the mean over the
            ranks where it is finite, and stays as it is where it is finite on none, such as a mask of -inf.
    """
    if not tensors:
        return
    scale = 2.0 ** -world_size.bit_length() if share is None else share  # a power of two rounds nothing
    whole = world_size * scale if share is None else 1.0
    own = torch.cat([_halves(tensor) for tensor in tensors])
    if nonfinite:
        finite = own.isfinite()
        sent = torch.cat((torch.where(finite, own, 0.0), finite.double())).mul_(scale)
        weighted, weight = split(total(sent), [own.numel(), own.numel()])
        mean = torch.where(weight > 0.0, weighted / weight, own)
    else:
        mean = total(own * scale).div_(whole)
    offset = 0
    with torch.no_grad():
        for tensor in tensors:
            target = real_view(tensor)
            count = target.numel() * (2 if tensor.dtype in _WIDE else 1)
            piece = mean[offset : offset + count]
            if tensor.dtype in _WIDE:
                high, low = split(piece, [target.numel(), target.numel()])
                piece = torch.where(high.isfinite(), high + low, high)
            target.copy_(piece.view(target.shape))
            offset += count


def _halves(tensor: Tensor) -> Tensor:
    """Returns float64, ``(n,)`` of a narrow tensor, ``(2 n,)`` of a wide one: each number's two halves."""
    flat = real_view(tensor).reshape(-1).double()
    if tensor.dtype not in _WIDE:
        return flat
    high = (flat.view(torch.int64) & _HIGH_BITS).view(torch.float64)
    high = torch.where(flat.isfinite(), high, flat)
    return torch.cat((high, torch.where(flat.isfinite(), flat - high, 0.0)))
