"""The change of tensors since the ranks last had them in common, and its compressed mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import NonFiniteGradientError
from ..gradient.bucket import Bucket
from .flat import digest_of, flatten, message_dtype, numel, pieces, real_view, split, unflatten_

if TYPE_CHECKING:
    from ..reduction.reducer import Reducer


class CompressedChange:
    """The change of some tensors since their ``anchor``, the point that all ranks have in common.

    With a reducer the change is compressed, and what was not sent waits in the reducer's memory. Without one
    the averager itself takes the mean of the ranks' tensors.

    Args:
        reducer: belongs to one averager. It may serve several changes, one bucket each.
        tensors: their present values are the anchor.
        numbers: one for each tensor, ascending. The memory's key of a tensor is ``"parameter 3"``.
        kind: the word before the number in that key.
        narrow: the anchor is float32 without a reducer too.

    Attributes:
        anchor: ``(n,)`` float32, or float64 where it need not be narrow and there are 64-bit tensors.
        numbers: of the tensors in it, ascending.
    """

    def __init__(
        self,
        reducer: Reducer | None,
        tensors: Sequence[Tensor],
        numbers: Sequence[int],
        kind: str = "parameter",
        narrow: bool = False,
    ) -> None:
        self.reducer, self.kind = reducer, kind
        self._narrow = narrow or reducer is not None
        self.numbers: list[int] = []
        self._numels: list[int] = []
        self.anchor = torch.empty(0, dtype=torch.float32, device="cpu")
        self.start_from(tensors, numbers)

    def start_from(self, tensors: Sequence[Tensor], numbers: Sequence[int]) -> None:
        """Makes the present values of these tensors the anchor."""
        dtype = message_dtype(tensors)
        anchor = flatten(tensors, torch.float32 if self._narrow else dtype)
        sizes = [numel(t) for t in tensors]
        if list(numbers) == self.numbers and sizes == self._numels and anchor.device == self.anchor.device:
            self.anchor.copy_(anchor)  # views of it stay views
        else:
            self.anchor, self.numbers, self._numels = anchor, list(numbers), sizes

    def lay_out(self, numbers: Sequence[int], tensors: Sequence[Tensor], *others: Tensor) -> list[Tensor]:
        """Lays the anchor out anew for these tensors: new ones join at their present values, others leave.

        Args:
            numbers: ascending, one for each tensor.
            tensors: read only where they are new.
            *others: tensors ``(n,)`` in the order of the anchor.

        Returns:
            The others in the new order, zero for new tensors.
        """
        if not numbers:
            self.anchor, self.numbers, self._numels = self.anchor.new_empty(0), [], []
            return [self.anchor.clone() for _ in others]
        anchors, rest = self.split(self.anchor), [self.split(other) for other in others]
        new = {
            n: flatten([t], self.anchor.dtype).to(self.anchor.device)
            for n, t in zip(numbers, tensors)
            if n not in anchors
        }
        laid = [
            torch.cat([old[n] if n in anchors else torch.zeros_like(new[n]) for n in numbers]) for old in rest
        ]
        self.anchor = torch.cat([anchors[n] if n in anchors else new[n] for n in numbers])
        self.numbers, self._numels = list(numbers), [numel(t) for t in tensors]
        return laid

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """Returns the change of the tensors, ``(n,)``, a new tensor."""
        return flatten(tensors, self.anchor.dtype).sub_(self.anchor)

    def is_at(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the tensors equal the anchor, rounded to their dtype, and are on its device."""
        for tensor, piece in zip(tensors, pieces(self.anchor, tensors), strict=True):
            own = real_view(tensor).reshape(-1)
            if not torch.equal(own, piece.to(own.device, own.dtype)):
                return False
        return not tensors or tensors[0].device == self.anchor.device

    def split(self, flat: Tensor) -> dict[int, Tensor]:
        """Views of ``flat`` ``(n,)``, which is laid out as the anchor, by number."""
        return dict(zip(self.numbers, split(flat, self._numels), strict=True))

    def reduce(self, change: Tensor, index: int = 0, is_last: bool = True) -> Tensor:
        """Overwrites ``change`` ``(n,)`` with the mean of what the ranks contributed, and returns it.

        Args:
            change: this rank's. It is the reducer's bucket ``index``.
            index: of the bucket.
            is_last: whether the reducer's step ends with it.
        """
        if self.reducer is None:
            raise RuntimeError("a change without a reducer is averaged by its averager")
        keys = tuple(f"{self.kind} {number}" for number in self.numbers)
        self.reducer.reduce(
            Bucket(index=index, buffer=change, keys=keys, numels=tuple(self._numels), is_last=is_last)
        )
        return change

    def digest(self) -> int:
        """Returns a fingerprint of the anchor's bits."""
        return digest_of([self.anchor])

    def state_dict(self) -> dict[str, Any]:
        """Returns a copy of the anchor, and the numbers and sizes of its tensors."""
        return {"anchor": self.anchor.clone(), "numbers": list(self.numbers), "numels": list(self._numels)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a saved anchor.

        Raises:
            ValueError: the anchor has another number of elements than its tensors.
        """
        saved = state["anchor"]
        numbers, numels = state.get("numbers", self.numbers), state.get("numels", self._numels)
        if saved.numel() != sum(numels):
            raise ValueError(f"anchor must have {sum(numels)} elements, got {saved.numel()}")
        if list(numbers) == self.numbers and list(numels) == self._numels:
            self.anchor.copy_(saved)
        else:
            self.anchor = saved.to(self.anchor.device, self.anchor.dtype, copy=True)
            self.numbers, self._numels = list(numbers), list(numels)


def reduce_together(
    changes: Sequence[CompressedChange], groups: Sequence[Sequence[Tensor]], unmoved: bool = False
) -> None:
    """Averages several changes in one step of their reducer, after which every group is at its new anchor.

    Each change is one bucket. The anchors move once all buckets are known to be finite. Where one is not, the
    reducer takes what the others had sent back into its memory, and their groups return to their old anchors.

    Args:
        changes: of one reducer, in the order of the buckets.
        groups: the tensors of each, which are overwritten.
        unmoved: this rank counts as not moved, whatever its tensors hold.

    Raises:
        NonFiniteGradientError: a bucket is not finite, and the reducer's policy is ``"error"``.
    """
    reducer = changes[0].reducer
    assert reducer is not None
    updates: list[Tensor] = []
    try:
        for index, (change, group) in enumerate(zip(changes, groups, strict=True)):
            own = torch.zeros_like(change.anchor) if unmoved else change.of(group)
            updates.append(change.reduce(own, index, is_last=index == len(changes) - 1))
    except NonFiniteGradientError:
        for change, group, _ in zip(changes, groups, updates, strict=False):
            unflatten_(group, change.anchor)
        raise
    thrown_away = reducer.nonfinite_buckets if reducer.nonfinite != "skip" else []
    for index, (change, group, update) in enumerate(zip(changes, groups, updates, strict=True)):
        if not thrown_away or index in thrown_away:  # a bucket that was thrown away itself is NaN
            change.anchor += update
        unflatten_(group, change.anchor)
