"""PR-SGD-Momentum: parameters and momenta averaged every I steps (Yu, Jin, Yang, arXiv:1905.03817)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import says_what_to_write
from .agreement import Ranks
from .anchored import Anchored
from .averager import AveragerOptions
from .compressed_change import CompressedChange, reduce_together
from .flat import flatten, message_dtype, shown_layout, tensors_of, unflatten_
from .moments import Choice, Moments
from .sync_sets import Period

if TYPE_CHECKING:
    from typing_extensions import Unpack


class RestartedMomentum(Anchored):
    """PR-SGD-Momentum: averages parameters and momentum buffers after every step of ``period``.

    This is the paper's Algorithm 1. ``SGD(momentum=beta)`` is its option I (Polyak).
    ``SGD(momentum=beta, nesterov=True)`` is its option II: torch computes ``u = beta u + g`` and steps along
    ``g + beta u``, the paper's ``v``. With ``momentum=0`` only parameters are averaged.

    Args:
        optimizer: the optimizer that steps, a ``torch.optim.SGD`` in the paper.
        period: I, local steps between averagings, a :class:`~commhooks.averaging.SyncSet`, or the steps
            themselves (from 1).
        moments: ``"average"`` (default for SGD): the state that goes with a parameter is averaged too, of any
            torch optimizer: Adam's moments and step counts. ``"leave"``: it stays local.
        **options: of :class:`~commhooks.averaging.Averager`. With a reducer the changes of the
            parameters and of the momentum buffers since the last averaging are compressed, each as a bucket
            of its own. All ranks must then start equal, which the first averaging checks. Moments of other
            optimizers than SGD are averaged uncompressed: a second moment must not become negative.

    Example::

        averager = RestartedMomentum(optimizer, period=8)
        for x, y in loader:
            ...
            optimizer.step()
            averager.average_parameters(model.parameters())

    Raises:
        ValueError: a period that is not a positive integer, an optimizer that is not SGD without ``moments``,
            or ``dampening``.
    """

    _takes_wire = False

    @says_what_to_write
    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        period: Period | None = None,
        *,
        moments: Choice | None = None,
        **options: Unpack[AveragerOptions],
    ) -> None:
        self.optimizer, self._moments = optimizer, Moments(optimizer, moments)
        compressed = options.get("reducer") is not None
        self._momentum_change: CompressedChange | None = None
        super().__init__(period, tensors_of(optimizer.param_groups), anchored=compressed, **options)
        if compressed and self._moments.is_sgd:
            self._momentum_change = CompressedChange(self.reducer, [], [], "momentum")
            self._momenta_start_at_zero()

    @property
    def options(self) -> list[str]:
        """The paper's option, ``"I"`` (Polyak) or ``"II"`` (Nesterov), for each of SGD's parameter groups."""
        return self._moments.options

    def settings(self) -> dict[str, object]:
        return {**self._moments.settings(), **super().settings()}

    def _average(self, tensors: list[Tensor], ranks: Ranks) -> None:
        moments = self._moments.of(tensors)
        own = flatten(tensors, message_dtype(tensors))
        if self._change is None:
            self._average_together([*tensors, *moments], ranks)
        else:
            changes, groups = [self._change], [tensors]
            if self._momentum_change is not None and moments:
                changes, groups = [self._change, self._momentum_change], [tensors, moments]
            reduce_together(changes, groups, unmoved=self.rank in ranks.nonfinite)
            if self._momentum_change is None:
                self._average_together(moments, ranks)
        self._figures.distance = float(torch.linalg.vector_norm(own.sub_(flatten(tensors, own.dtype))))

    def _average_together(self, tensors: list[Tensor], ranks: Ranks) -> None:
        """Averages all tensors in one message, and step counts (scalars) in another of float64, exactly."""
        counts = [t for t in tensors if t.ndim == 0 and not self._moments.is_sgd]
        rest = [t for t in tensors if not any(t is count for count in counts)]
        for group, dtype in ((rest, None), (counts, torch.float64)):
            if group:
                flat = flatten(group, dtype or message_dtype(group))
                unflatten_(group, self._channel.mean(flat, self._what(), ranks.share(self.rank)))

    # -- membership, the starting point and state -----------------------------------------------------------

    def _with_state(self, tensors: list[Tensor]) -> list[Tensor]:
        return [*tensors, *self._moments.of(tensors)]

    def _state_layout(self, tensors: list[Tensor]) -> str:
        return shown_layout(self._moments.of(tensors))

    def _with_momentum(self, numbers: Sequence[int]) -> list[int]:
        has = self._moments.with_momentum(self._tensors(numbers))
        return [n for n, momentum in zip(numbers, has, strict=True) if momentum]

    def _momenta_start_at_zero(self) -> None:
        assert self._change is not None and self._momentum_change is not None
        numbers = self._with_momentum(self._change.numbers)
        self._momentum_change.start_from([torch.zeros_like(t) for t in self._tensors(numbers)], numbers)

    def _start_from(self, numbers: list[int]) -> None:
        super()._start_from(numbers)
        if self._momentum_change is not None:
            self._momenta_start_at_zero()

    def _lay_out(self, numbers: list[int]) -> None:
        super()._lay_out(numbers)
        if self._momentum_change is not None:
            kept = self._with_momentum(numbers)
            self._momentum_change.lay_out(kept, self._moments.of(self._tensors(kept)))

    def _starting_point(self) -> int:
        if self._change is not None and self._momentum_change is not None and self._compares_start:
            return self._change.digest() ^ self._momentum_change.digest()
        return super()._starting_point()

    def _shared_state(self) -> dict[str, Any]:
        shared = super()._shared_state()
        if self._momentum_change is not None:
            shared["momentum"] = self._momentum_change.state_dict()
        return shared

    def _load_shared_state(self, state: dict[str, Any]) -> None:
        super()._load_shared_state(state)
        if self._momentum_change is not None:
            self._momentum_change.load_state_dict(state["momentum"])
