"""Base of the averagers in blocks: a rule moves ``w~`` by the mean change, and all ranks restart there."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .agreement import Ranks
from .anchored import Anchored
from .averager import AveragerOptions
from .flat import Parameters, tensors_of
from .sync_sets import Period

if TYPE_CHECKING:
    from typing_extensions import Unpack


class BlockAverager(Anchored):
    """Base of M-AVG, SlowMo and DiLoCo: after each block a rule moves ``w~`` by ``d = mean_p w_p - w~``.

    Args:
        period: local steps between averagings, a set, or the steps themselves.
        params: the model's parameters, at the common starting point ``w~``.
        reset_optimizer: an optimizer whose state is cleared at every restart.
        **options: of :class:`~commhooks.averaging.Averager`.
    """

    def __init__(
        self,
        period: Period | None,
        params: Parameters,
        *,
        reset_optimizer: torch.optim.Optimizer | None = None,
        **options: Unpack[AveragerOptions],
    ) -> None:
        super().__init__(period, tensors_of(params), **options)
        self.reset_optimizer = reset_optimizer

    @property
    def anchor(self) -> Tensor:
        """w~, ``(n,)``: the model at the start of this block, the same on every rank."""
        assert self._change is not None
        return self._change.anchor

    @abstractmethod
    def _move_anchor(self, change: Tensor) -> None:
        """Moves ``anchor`` by the rule. ``change`` (n,) is d, and may be overwritten."""

    def _average(self, tensors: list[Tensor], ranks: Ranks) -> None:
        self._move_anchor(self._mean_change(tensors, ranks))
        self._restart(tensors)
        if self.reset_optimizer is not None:
            self.reset_optimizer.state.clear()
