"""``HeldAverage``: an average that a ``.grad`` still holds when the next backward pass adds to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .memory_order import flattened

_DENSE_FROM = 3
"""With one element in so many, or more, that is not zero the whole gradient is copied.

Pairs with int64 indices would then take more memory.
"""


@dataclass(frozen=True)
class HeldAverage:
    """A copy of an average, to take it out of a bucket before the exchange and to put it back afterwards.

    Attributes:
        values: the gradient's dtype. Shape ``(m,)`` beside indices; else ``(n,)``, the whole gradient.
        indices: shape ``(m,)``, int64, the places that are not zero; None where many are not.
    """

    values: Tensor
    indices: Tensor | None

    @classmethod
    def of(cls, grad: Any, parameter: Tensor) -> HeldAverage:
        """Copies what is not zero in a gradient, in the order of the parameter's memory.

        Waits for the device.
        """
        flat = flattened(grad.detach(), parameter)
        if _DENSE_FROM * int(flat.count_nonzero()) >= flat.numel():
            return cls(flat.clone(), None)
        indices = flat.nonzero().squeeze(1)
        return cls(flat.index_select(0, indices), indices)

    @property
    def is_empty(self) -> bool:
        """Whether every element is zero."""
        return self.values.numel() == 0

    def take_out(self, segment: Tensor) -> None:
        """Subtracts the average from ``segment`` (n,), the parameter's part of a bucket."""
        self._keep_memory(segment)
        if self.indices is None:
            segment.sub_(self.values)
        else:
            segment.index_add_(0, self.indices, self.values, alpha=-1)

    def put_back(self, segment: Tensor) -> None:
        """Adds the average to ``segment`` (n,), rounded to its dtype."""
        self._keep_memory(segment)
        if self.indices is None:
            segment.add_(self.values)
        else:
            segment.index_add_(0, self.indices, self.values)

    def _keep_memory(self, segment: Tensor) -> None:
        """Keeps the copy's memory until this stream is done with it. It was made on backward's stream."""
        if segment.is_cuda:
            for tensor in (self.values, self.indices):
                if tensor is not None:
                    tensor.record_stream(torch.cuda.current_stream(segment.device))
