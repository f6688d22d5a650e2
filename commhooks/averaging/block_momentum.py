"""K-AVG and M-AVG: periodic averaging with block momentum (Cong and Liu, arXiv:2110.00625, Algorithm 1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import says_what_to_write
from .averager import AveragerOptions
from .blocks import BlockAverager
from .flat import Parameters
from .learning_rates import check_fraction
from .sync_sets import Period

if TYPE_CHECKING:
    from typing_extensions import Unpack


class BlockMomentum(BlockAverager):
    """M-AVG: averages the models every ``period`` steps, with momentum on the mean change of a block.

    ``a = mean_p w_p; d = a - w~; v = mu v + d; w~ = w~ + v``. All ranks restart from ``w~``. ``mu=0`` is
    K-AVG.

    The local optimizer is free (SGD, momentum SGD, Adam). The paper leaves open what becomes of its own
    momentum at a restart. It is kept here, unless ``reset_optimizer`` names the optimizer.
    :class:`~commhooks.averaging.DiLoCo` takes any torch optimizer in place of the block momentum. With
    ``SGD(lr=1, momentum=mu)`` it is this algorithm.

    Args:
        mu: block momentum in [0, 1).
        period: K, local steps between averagings, a :class:`~commhooks.averaging.SyncSet`, or the steps
            themselves (from 1).
        params: the model's parameters at the start of the first block: they are the first ``w~``. They must
            be the same on every rank. The first synchronisation checks that.
        reset_optimizer: an optimizer whose state (momentum buffers, Adam's moments) is cleared at every
            restart. None: no state is cleared.
        **options: of :class:`~commhooks.averaging.Averager`. With a reducer ``w_p - w~`` is compressed, and
            ``d`` is the mean of what was sent. The rest waits in the reducer's memory. Buffers get no
            momentum.

    Example::

        averager = BlockMomentum(mu=0.7, period=8, params=model.parameters(), module=model)
        for x, y in loader:
            ...
            optimizer.step()
            averager.average_parameters(model.parameters())

    Attributes:
        anchor: w~, ``(n,)``: the model at the start of this block, the same on every rank.
        velocity: v, ``(n,)``, in parameter units.

    Raises:
        ValueError: ``mu`` or ``period`` out of range, or no parameters.
    """

    beside = ("velocity",)
    velocity: Tensor

    @says_what_to_write
    def __init__(
        self,
        mu: float,
        period: Period | None = None,
        *,
        params: Parameters,
        reset_optimizer: torch.optim.Optimizer | None = None,
        **options: Unpack[AveragerOptions],
    ) -> None:
        self.mu = check_fraction("mu", mu)
        super().__init__(period, params, reset_optimizer=reset_optimizer, **options)

    def settings(self) -> dict[str, object]:
        return {"mu": self.mu, **super().settings()}

    def _move_anchor(self, change: Tensor) -> None:
        self.velocity.mul_(self.mu).add_(change)
        self.anchor.add_(self.velocity)
