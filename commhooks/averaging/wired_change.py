"""A model's change on a low-bit wire. What the sender withholds stays in its model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import NonFiniteGradientError
from ..exchange import LowBit
from ..transports import Transport
from ..wire.low_bit import chunks
from ..wire.message import Context
from .flat import pieces, real_view

logger = logging.getLogger(__name__)


class WiredChange:
    """Averages a change ``(n,)`` over the ranks by a :class:`~commhooks.LowBit`.

    Args:
        wire: how the change is sent.

    Attributes:
        owned: what the second rounding kept of the chunk that this rank owns, ``(m,)``, as a mean over the
            ranks. Empty before the first exchange.
        start: where the chunk begins.
    """

    def __init__(self, wire: LowBit) -> None:
        self.wire = wire
        self.forget()

    def forget(self) -> None:
        """Owns nothing, as at a start."""
        self.owned, self.start = torch.empty(0, dtype=torch.float32, device="cpu"), 0

    def mean(self, transport: Transport, change: Tensor, step: int, what: str, propagate: bool) -> Tensor:
        """Returns the mean of what the ranks sent, a new ``(n,)``, the same bits on all ranks. Collective.

        Args:
            transport: connects the ranks.
            change: this rank's, ``(n,)`` float32, which is overwritten with what was not sent.
            step: local steps so far.
            what: names the averaging in the error.
            propagate: where a sum is not finite, return NaN everywhere instead of an error.

        Raises:
            NonFiniteGradientError: a sum is not finite, on all ranks. Nothing else has changed then.
        """
        begin, end = chunks(change.numel(), transport.world_size)[transport.rank]
        owned = self.owned if self.owned.numel() else change.new_zeros(end - begin)
        out = self.wire.mean(transport, change, owned.to(change), False, Context(0, step))
        if not out.nonfinite:
            self.owned, self.start = out.owned, begin
            return out.mean
        if not propagate:
            raise NonFiniteGradientError(
                f"rank {transport.rank}, {what}: the mean change is not finite; nothing was averaged"
            )
        return change.fill_(float("nan")).clone()

    def hand_over(self, tensors: Sequence[Tensor], world_size: int) -> None:
        """Adds P times what this rank owns to its own tensors, and owns nothing from then on.

        So ``mean_p w_p + owned`` stays as it is. It is called where the layout changes.

        Args:
            tensors: in the present layout, changed in place.
            world_size: P.
        """
        if self.owned.numel():
            whole = self.owned.new_zeros(sum(real_view(t).numel() for t in tensors))
            whole[self.start : self.start + self.owned.numel()] = self.owned
            with torch.no_grad():
                for tensor, piece in zip(tensors, pieces(whole, tensors), strict=True):
                    target = real_view(tensor)
                    target.add_(piece.view(target.shape).to(target), alpha=world_size)
        self.forget()

    def state_dict(self) -> dict[str, Any]:
        """Returns a copy of what this rank owns, and where it begins."""
        return {"start": self.start, "owned": self.owned.clone()}

    def load_state_dict(self, state: dict[str, Any], numel: int, rank: int, world_size: int) -> None:
        """Takes this rank's chunk out of a saved state, of this rank or of all ranks joined.

        Raises:
            ValueError: the state does not hold this rank's chunk of ``numel`` elements.
        """
        self.forget()
        if not state["owned"].numel():
            return
        begin, end = chunks(numel, world_size)[rank]
        first, last = begin - state["start"], end - state["start"]
        if begin < end and not 0 <= first < last <= state["owned"].numel():
            held = f"{state['start']} to {state['start'] + state['owned'].numel()}"
            raise ValueError(
                f"the saved wire holds elements {held}, and rank {rank} of {world_size} owns {begin} to "
                f"{end} of {numel}: load each rank's own state, or join them all by average_checkpoints"
            )
        self.owned, self.start = state["owned"][max(first, 0) : max(last, 0)].clone(), begin


def joined(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the states of all ranks' wires as one, which holds every chunk."""
    return {"start": 0, "owned": torch.cat([state["owned"].cpu() for state in states])}
