"""``Expected``: the exchange that would have come next, had a Reducer not been reset or loaded."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

from ..gradient.bucket import Bucket
from ..memory.parameter_memory import same_keys
from ..transports import Transport
from .sizes import Sizes


@dataclass(frozen=True)
class Expected:
    """What a Reducer knew of its next exchange before ``reset`` or ``load_state_dict``.

    A rank that was not reset goes on with that exchange. Its message then has that exchange's size.

    Attributes:
        transport: connected the ranks.
        step: the number of the step that would have come.
        layouts: the parameters of each bucket, by its index.
        sizes: the numbers of pairs that the ranks had announced.
        sends_everything: whether the step would have sent all elements.
    """

    transport: Transport
    step: int
    layouts: Mapping[int, tuple[Hashable, ...]]
    sizes: Sizes
    sends_everything: bool

    def comes_at_once(self, bucket: Bucket, transport: Transport, undoable: bool) -> bool:
        """Whether the bucket would have been exchanged at once, without comparing settings before."""
        keys = self.layouts.get(bucket.index)
        if transport is not self.transport or keys is None or not same_keys(keys, bucket.keys):
            return False
        return not (undoable and self.sizes.changes(bucket.index))
