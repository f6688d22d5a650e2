"""K-AVG and M-AVG: periodic averaging with block momentum (Cong and Liu, arXiv:2110.00625, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .averager import Averager
from .flat import flatten, message_dtype, numel_of, parameters_of, unflatten_
from .learning_rates import check_fraction
from .sync_sets import Every, positive_int


class BlockMomentum(Averager):
    """Every ``period`` steps: ``a = mean_p w_p; d = a - w~; v = mu v + d; w~ = w~ + v``; all restart from
    ``w~``.

    ``mu=0`` is K-AVG. The local optimizer is free (SGD, momentum SGD, Adam). What becomes of its own momentum
    at a restart the paper leaves open: it is kept, unless ``reset_optimizer`` names the optimizer. More
    workers allow a larger ``mu`` (Lemma 6); adding momentum wants a smaller ``period`` (Lemma 7).

    Args:
        mu: block momentum in [0, 1).
        period: K, local steps between averagings.
        params: the model's parameters. Needed at once: ``w~`` is where the first block starts, the same on
            every rank; the first synchronisation checks that.
        reset_optimizer: an optimizer whose state (momentum buffers, Adam's moments) is cleared at every
            restart.
        **options: ``transport``, ``module``, ``buffers``, ``reducer``, ``timeout_s`` of
            :class:`~commhooks.averaging.Averager`. With a reducer ``w_p - w~`` is what is compressed, and
            ``d`` the mean of what was contributed; what was not waits in the reducer's memory. Buffers get no
            momentum.

    Example::

        averager = BlockMomentum(mu=0.7, period=8, params=model.parameters(), module=model)
        for x, y in loader:
            ...
            optimizer.step()
            averager.average_parameters(model.parameters())

    Raises:
        ValueError: ``mu`` or ``period`` out of range; no parameters.
    """

    def __init__(
        self,
        mu: float,
        period: int,
        *,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        reset_optimizer: torch.optim.Optimizer | None = None,
        **options: Any,
    ) -> None:
        self.mu = check_fraction("mu", mu)
        self.sync = Every(positive_int("period", period))
        tensors = parameters_of(params)
        if not tensors:
            raise ValueError("params must hold at least one parameter that requires a gradient, got none")
        super().__init__(**options)
        self.reset_optimizer, self._members = reset_optimizer, tensors
        dtype = torch.float32 if self.reducer is not None else message_dtype(tensors)
        self.anchor = flatten(tensors, dtype)
        """w~, flat: the model at the start of this block, the same on every rank."""
        self._check_start(self.anchor)
        self.velocity = torch.zeros_like(self.anchor)
        """v, flat, in parameter units."""

    @property
    def period(self) -> int:
        """K."""
        return self.sync.period

    def is_due(self, step: int) -> bool:
        return step in self.sync

    def settings(self) -> str:
        return f"BlockMomentum(mu={self.mu!r}, period={self.period}, compressed={self.reducer is not None})"

    def _start_from(self, tensors: Sequence[Tensor]) -> None:
        self._check_numel(tensors)
        self.anchor = flatten(tensors, self.anchor.dtype)
        self._check_start(self.anchor)

    def _check_numel(self, tensors: Sequence[Tensor]) -> None:
        if numel_of(tensors) != self.anchor.numel():
            raise ValueError(f"params must be the {self.anchor.numel()} elements the averager was made with, "
                             f"got {numel_of(tensors)}")  # fmt: skip

    def _synchronise(self, tensors: list[Tensor]) -> None:
        self._check_numel(tensors)
        self._agree(tensors)
        flat = flatten(tensors, self.anchor.dtype)
        if self.reducer is None:
            block = self._mean(flat, self._what()).sub_(self.anchor)
        else:
            block = self._reduce(0, flat.sub_(self.anchor), tensors, "parameter", is_last=True)
        self.velocity.mul_(self.mu).add_(block)
        self.anchor.add_(self.velocity)
        unflatten_(tensors, self.anchor)
        self._synchronise_buffers()
        if self.reset_optimizer is not None:
            self.reset_optimizer.state.clear()

    def _shared_state(self) -> dict[str, Any]:
        return {"anchor": self.anchor.clone(), "velocity": self.velocity.clone()}

    def _load_shared_state(self, state: dict[str, Any]) -> None:
        if state["anchor"].shape != self.anchor.shape:
            raise ValueError(
                f"anchor must have {self.anchor.numel()} elements, got {state['anchor'].numel()}"
            )
        self.anchor.copy_(state["anchor"])
        self.velocity.copy_(state["velocity"])
        self._check_start(self.anchor)
