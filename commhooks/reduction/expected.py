"""``Expected``: the exchange that would have come next, had a Reducer not been reset or loaded."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace

import torch

from ..exchange import Aggregator
from ..gradient.bucket import Bucket
from ..memory import Memory
from ..memory.parameter_memory import same_keys
from ..selection.selectors import Selector
from ..transports import Transport
from ..wire.message import Context
from .routes import Route, route_of
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

    def zeros(
        self,
        bucket: Bucket,
        context: Context,
        memory: Memory,
        selector: Selector | None,
        aggregator: Aggregator,
        goes_dense: Callable[[int, int, int], bool],
    ) -> Route:
        """Makes this exchange's route of the bucket, corrected, with zeros in the place of the gradient.

        Args:
            bucket: its gradient is not read.
            context: what the message says of itself.
            memory: an empty one, which receives the zeros.
            selector: the Reducer's.
            aggregator: likewise.
            goes_dense: tells by numel, k and world size whether the bucket is sent densely.
        """
        k = numel = bucket.numel
        if selector is not None:
            k, _ = self.sizes.at(selector, bucket.index, numel, self.step, is_new=False)
        nothing = replace(bucket, buffer=torch.zeros_like(bucket.buffer))
        held, _ = memory.for_bucket(nothing)
        dense = self.sends_everything or goes_dense(numel, k, self.transport.world_size)
        parts = (memory, held, memory.operands(held, nothing, scale=None), context)
        route = route_of(parts, selector, aggregator, k, dense)
        route.correct()
        return route
