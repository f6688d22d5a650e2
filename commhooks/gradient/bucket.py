"""``Bucket``: a flat gradient and the parameters whose gradients it concatenates."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..native import checks
from .held import HeldAverage
from .memory_order import flattened

GRAD_DTYPES = checks.GRAD_DTYPES
"""The dtypes of gradients, those that the kernels take."""
_MAX_NUMEL = 2**31 - 1


@dataclass(frozen=True)
class Bucket:
    """A flat gradient that a Reducer overwrites with its average over the ranks.

    The gradient consists of segments, one per parameter.

    Attributes:
        index: position among the step's buckets; the same bucket has the same index on all ranks.
        buffer: shape ``(n,)``, float32, bfloat16 or float16, contiguous. Overwritten with the result.
        keys: one per segment: DDP's ``Parameter`` object or a name. The memory is stored by key.
        numels: number of elements of each segment, in the buffer's order. The sum is ``n``.
        is_last: whether this bucket ends the step.
        unreached: positions of parameters that no backward pass of this step reached, as far as it is known.
        same_step: positions of parameters that an earlier bucket of the same optimizer step had too, so that
            their weight decay and the decay of their velocity have happened.
        in_memory_order: whether a segment has its parameter's elements in the order of the parameter's own
            memory, as DDP lays them out. False: in the order of its indices. The two differ for parameters in
            ``torch.channels_last``.
        step_norm: the L2 norm of all of this rank's gradients in this step, one element; None: unknown.

    Raises:
        TypeError: the buffer is sparse or of another dtype.
        ValueError: the buffer is not flat and contiguous or has 2**31 - 1 elements or more, or ``keys`` and
            ``numels`` do not fit it.
    """

    index: int
    buffer: Tensor
    keys: tuple[Hashable, ...]
    numels: tuple[int, ...]
    is_last: bool = True
    unreached: frozenset[int] = frozenset()
    same_step: frozenset[int] = frozenset()
    in_memory_order: bool = False
    step_norm: Tensor | None = None

    def __post_init__(self) -> None:
        b = self.buffer
        if b.layout != torch.strided or b.dtype not in GRAD_DTYPES:
            raise TypeError(
                f"bucket {self.index}: gradients must be dense float32, bfloat16 or float16, got {b.dtype} "
                f"({b.layout})"
            )
        if b.dim() != 1 or not b.is_contiguous():
            raise ValueError(f"bucket {self.index}: buffer must be flat and contiguous, got {tuple(b.shape)}")
        if b.numel() >= _MAX_NUMEL:
            raise ValueError(
                f"bucket {self.index} has {b.numel()} elements; int32 indices allow fewer than 2**31 - 1: "
                "lower DDP's bucket_cap_mb"
            )
        if len(self.keys) != len(self.numels) or sum(self.numels) != b.numel():
            raise ValueError(
                f"bucket {self.index}: {len(self.keys)} keys with {sum(self.numels)} elements for a buffer "
                f"of {b.numel()}"
            )

    @property
    def numel(self) -> int:
        """Number of elements in the buffer."""
        return self.buffer.numel()

    def weights(self) -> list[tuple[int, Tensor]]:
        """Returns ``(position, values)`` of every parameter that this step's backward reached.

        The values have shape ``(numel,)`` and the segment's order.

        Raises:
            ValueError: a key is no parameter, so that its values are unknown.
        """
        found = []
        for position, (key, numel) in enumerate(zip(self.keys, self.numels, strict=True)):
            if not isinstance(key, Tensor) or key.numel() != numel:
                raise ValueError(
                    f"bucket {self.index}: weight decay needs the parameters, and {key!r:.60} is none: it "
                    "goes with DDP and with Horovod"
                )
            if position not in self.unreached:
                weight = key.detach()
                flat = flattened(weight, weight) if self.in_memory_order else weight.reshape(-1)
                found.append((position, flat))
        return found

    def take_out(self, stale: Iterable[int], held: Mapping[int, HeldAverage]) -> dict[int, Tensor]:
        """Leaves only this backward pass's gradients in the buffer.

        Waits for the device where ``stale`` has a position that ``held`` has not.

        Args:
            stale: positions without a gradient of this pass. Their segments become zero.
            held: averages of earlier passes, by position. They are subtracted.

        Returns:
            Copies of the stale segments that were not zero and are not in ``held``, for :meth:`put_back`.
        """
        stale = frozenset(stale)
        kept = {p: s.clone() for p in sorted(stale - held.keys()) if bool((s := self._segment(p)).any())}
        for position in kept.keys() | (stale & held.keys()):
            self._segment(position).zero_()
        for position in held.keys() - stale:
            held[position].take_out(self._segment(position))
        return kept

    def put_back(self, kept: Mapping[int, Tensor], held: Mapping[int, HeldAverage]) -> None:
        """Adds what :meth:`take_out` took out to the average over ranks.

        A segment in ``kept`` is restored only if it is zero, because no rank had a gradient there. With
        ``gradient_as_bucket_view`` it is the parameter's ``.grad``, which a pass without a gradient must
        leave unchanged. Waits for the device where ``kept`` is not empty.

        Args:
            kept: what :meth:`take_out` returned.
            held: what :meth:`take_out` was given. All ranks hold the same averages.
        """
        for position, values in kept.items():
            if not bool(self._segment(position).any()):
                self._segment(position).copy_(values)
        for position, average in held.items():
            average.put_back(self._segment(position))

    def _segment(self, position: int) -> Tensor:
        start = sum(self.numels[:position])
        return self.buffer[start : start + self.numels[position]]
