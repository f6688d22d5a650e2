"""SlowMo: slow momentum over blocks, in units of the gradient (Wang et al., arXiv:1910.00643)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import says_what_to_write
from .averager import AveragerOptions
from .blocks import BlockAverager
from .flat import tensors_of
from .learning_rates import check_fraction
from .sync_sets import Period

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SlowMo(BlockAverager):
    """SlowMo: averages the models every ``period`` steps, with slow momentum in units of the gradient.

    ``u = beta u + (w~ - mean_p w_p) / gamma; w~ = w~ - alpha gamma u``. All ranks restart from ``w~``.
    ``gamma`` is the inner optimizer's learning rate at the synchronisation, by parameter group. So the slow
    momentum stays valid when the rate changes. While the rate is constant, this is
    :class:`~commhooks.averaging.DiLoCo` with ``SGD(lr=alpha, momentum=beta)``, and with ``alpha=1``
    :class:`~commhooks.averaging.BlockMomentum`.

    Args:
        inner_optimizer: the optimizer that steps. Its parameters are averaged. A group whose rate is 0 at a
            synchronisation keeps its ``u`` and takes no step there: its ``w~`` becomes the mean.
        beta: slow momentum in [0, 1).
        period: tau, local steps between averagings, a :class:`~commhooks.averaging.SyncSet`, or the steps
            themselves (from 1).
        alpha: slow learning rate, 1 in the paper.
        reset_optimizer: whether the inner optimizer's state is cleared at every restart: the paper's "reset"
            of the fast momentum.
        **options: of :class:`~commhooks.averaging.Averager`.

    Attributes:
        momentum: u, ``(n,)``, in units of the gradient.

    Raises:
        ValueError: an argument out of range.
    """

    beside = ("momentum",)
    momentum: Tensor

    @says_what_to_write
    def __init__(
        self,
        inner_optimizer: torch.optim.Optimizer,
        beta: float,
        period: Period | None = None,
        *,
        alpha: float = 1.0,
        reset_optimizer: bool = False,
        **options: Unpack[AveragerOptions],
    ) -> None:
        if not isinstance(alpha, (int, float)) or not 0.0 < alpha < math.inf:
            raise ValueError(f"alpha must be positive and finite, got {alpha!r}")
        self.beta, self.alpha, self.inner_optimizer = (
            check_fraction("beta", beta),
            float(alpha),
            inner_optimizer,
        )
        params = tensors_of(inner_optimizer.param_groups)
        super().__init__(
            period, params, reset_optimizer=inner_optimizer if reset_optimizer else None, **options
        )

    def settings(self) -> dict[str, object]:
        return {"beta": self.beta, "alpha": self.alpha, **super().settings()}

    def _varying(self) -> dict[str, object]:
        return {"inner rates": [float(group["lr"]) for group in self.inner_optimizer.param_groups]}

    def _move_anchor(self, change: Tensor) -> None:
        assert self._change is not None
        rates = self._rates()
        steps, momenta = self._change.split(change), self._change.split(self.momentum)
        for number, w in self._change.split(self.anchor).items():
            rate, u = rates[number], momenta[number]
            if rate == 0.0:
                w.add_(steps[number])
                continue
            u.mul_(self.beta).sub_(steps[number], alpha=1.0 / rate)
            w.sub_(u, alpha=self.alpha * rate)

    def _rates(self) -> dict[int, float]:
        """Returns the inner learning rate of each tensor, by number."""
        rate_of = {id(p): float(g["lr"]) for g in self.inner_optimizer.param_groups for p in g["params"]}
        assert self._change is not None
        return {n: rate_of[id(self._members.tensors[n])] for n in self._change.numbers}
