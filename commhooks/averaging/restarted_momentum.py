"""PR-SGD-Momentum: parameters and momenta averaged every I steps (Yu, Jin, Yang, arXiv:1905.03817)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import NonFiniteGradientError
from .averager import Averager
from .flat import flatten, message_dtype, numel_of, parameters_of, unflatten_
from .sync_sets import Every, SyncSet, as_sync_set


class MomentumAverager(Averager):
    """An averager of torch SGD's parameters *and* momentum buffers. Base of the two algorithms of the paper.

    ``SGD(momentum=beta)`` is the paper's option I (Polyak), ``SGD(momentum=beta, nesterov=True)`` option II:
    torch computes ``u = beta u + g`` and steps along ``g + beta u``, the paper's ``v``. A parameter that had
    no gradient yet on this rank has no buffer; it counts as zero, and gets one. With ``momentum=0`` only
    parameters are averaged.

    Args:
        optimizer: a ``torch.optim.SGD`` (or one with its ``momentum_buffer`` convention), the one that steps.
        **options: see :class:`~commhooks.averaging.Averager`.

    Raises:
        ValueError: the optimizer has no ``momentum``, or ``dampening`` (the paper has none, and torch skips
            it on the first step, so that a zero buffer would not equal a missing one).
    """

    def __init__(self, optimizer: torch.optim.Optimizer, **options: Any) -> None:
        for group in optimizer.param_groups:
            if "momentum" not in group or "nesterov" not in group:
                raise ValueError(
                    f"optimizer must have SGD's momentum (torch.optim.SGD), got {type(optimizer).__name__}"
                )
            if group.get("dampening", 0.0) != 0.0:
                raise ValueError(f"dampening must be 0, got {group['dampening']!r}")
        super().__init__(**options)
        self.optimizer = optimizer

    @property
    def options(self) -> list[str]:
        """The paper's option for each parameter group: ``"I"`` (Polyak) or ``"II"`` (Nesterov)."""
        return ["II" if group.get("nesterov", False) else "I" for group in self.optimizer.param_groups]

    def settings(self) -> str:
        momenta = [group["momentum"] for group in self.optimizer.param_groups]
        compressed = self.reducer is not None
        return f"{type(self).__name__}(options={self.options}, momentum={momenta}, compressed={compressed})"

    def _with_momentum(self, tensors: list[Tensor]) -> Iterator[Tensor]:
        """Those of the tensors that have a momentum, in the order of ``tensors``, so that ranks agree."""
        groups = [(g["momentum"], {id(p) for p in g["params"]}) for g in self.optimizer.param_groups]
        for tensor in tensors:
            found = [momentum for momentum, members in groups if id(tensor) in members]
            if not found:
                raise ValueError(
                    f"params must belong to the optimizer, got a {tuple(tensor.shape)} that does not"
                )
            if found[0] != 0.0:
                yield tensor

    def _momenta(self, tensors: list[Tensor]) -> list[Tensor]:
        """The momentum buffers of the tensors that have a momentum; missing ones are made, as zeros."""
        buffers = []
        for tensor in self._with_momentum(tensors):
            state = self.optimizer.state[tensor]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(tensor, memory_format=torch.preserve_format)
            buffers.append(state["momentum_buffer"])
        return buffers


class RestartedMomentum(MomentumAverager):
    """Every ``period`` steps each worker's parameters and momentum buffers become the averages (Algorithm 1).

    Args:
        optimizer: the ``torch.optim.SGD`` that steps; ``nesterov`` chooses the option.
        period: I, local steps between averagings, or a :class:`~commhooks.averaging.SyncSet`.
        **options: ``transport``, ``module``, ``buffers``, ``reducer``, ``timeout_s`` of
            :class:`~commhooks.averaging.Averager`. With a reducer both the parameters' and the buffers'
            changes since the last averaging are compressed, each with its own memory; all ranks must start
            equal, which the first averaging checks.

    Example::

        averager = RestartedMomentum(optimizer, period=8)
        for x, y in loader:
            ...
            optimizer.step()
            averager.average_parameters(model.parameters())

    Raises:
        ValueError: see :class:`MomentumAverager`; a period that is not a positive integer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, period: int | SyncSet, **options: Any) -> None:
        self.sync = as_sync_set(period)
        super().__init__(optimizer, **options)
        self._anchors: list[Tensor] | None = None
        if self.reducer is not None:
            self._members = parameters_of(optimizer.param_groups)
            momenta = numel_of(self._with_momentum(self._members))
            self._anchors = [torch.empty(0), torch.zeros(momenta)]
            self._start_from(self._members)

    @property
    def period(self) -> int | None:
        """I, when the set is a plain period."""
        return self.sync.period if isinstance(self.sync, Every) else None

    def is_due(self, step: int) -> bool:
        return step in self.sync

    def settings(self) -> str:
        return f"{super().settings()} at {self.sync!r}"

    def _start_from(self, tensors: Sequence[Tensor]) -> None:
        if self._anchors is not None:
            flat = flatten(tensors, torch.float32)
            self._anchors = [flat, self._anchors[1].to(flat.device)]
            self._check_start(*self._anchors)

    def _synchronise(self, tensors: list[Tensor]) -> None:
        self._agree(tensors)
        momenta = self._momenta(tensors)
        if self._anchors is None:
            both = [*tensors, *momenta]
            flat = flatten(both, message_dtype(both))
            unflatten_(both, self._mean(flat, self._what()))
        else:
            self._reduce_groups([tensors, momenta] if momenta else [tensors], self._anchors)
        self._synchronise_buffers()

    def _reduce_groups(self, groups: list[list[Tensor]], anchors: list[Tensor]) -> None:
        """One step of the reducer, a bucket for each group; the anchors move once both are known to be good.

        Where one is not, the reducer takes back into its memory what the other had sent: that group restarts
        from its old anchor.
        """
        assert self.reducer is not None
        updates: list[Tensor] = []
        try:
            for index, (kind, group) in enumerate(zip(("parameter", "momentum"), groups, strict=False)):
                delta = flatten(group, torch.float32).sub_(anchors[index])
                updates.append(self._reduce(index, delta, group, kind, is_last=index == len(groups) - 1))
        except NonFiniteGradientError:
            for group, anchor, _ in zip(groups, anchors, updates, strict=False):
                unflatten_(group, anchor)
            raise
        thrown_away = self.reducer.nonfinite_buckets if self.reducer.nonfinite != "skip" else []
        for index, (group, anchor, update) in enumerate(zip(groups, anchors, updates, strict=False)):
            if not thrown_away or index in thrown_away:  # a bucket that was thrown away itself is NaN
                anchor += update
            unflatten_(group, anchor)

    def _shared_state(self) -> dict[str, Any]:
        return {} if self._anchors is None else {"anchors": [a.clone() for a in self._anchors]}

    def _load_shared_state(self, state: dict[str, Any]) -> None:
        if (self._anchors is None) != ("anchors" not in state):
            raise ValueError(
                f"the state was saved {'without' if self._anchors is not None else 'with'} a reducer"
            )
        for own, saved in zip(self._anchors or [], state.get("anchors", []), strict=True):
            own.copy_(saved)
        if self._anchors is not None:
            self._check_start(*self._anchors)
