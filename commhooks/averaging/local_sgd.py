"""Local SGD: workers step alone and average now and then (Stich, arXiv:1805.09767, Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .averager import Averager
from .flat import flatten, message_dtype, parameters_of, unflatten_
from .sync_sets import SyncSet, as_sync_set


class LocalSGD(Averager):
    """After every step in ``sync`` each worker's model becomes the (weighted) average of all workers' models.

    The paper's line 8 averages ``x_t``; its equation 4 averages the iterates *after* the update, which is
    meant and done here. ``sync=1`` is mini-batch SGD, :class:`~commhooks.averaging.OneShot` one-shot
    averaging. The local optimizer is free; its own state stays local
    (:class:`~commhooks.averaging.RestartedMomentum` averages momentum).

    Args:
        sync: H, a :class:`~commhooks.averaging.SyncSet`, or the steps themselves (from 1).
        weight: this worker's share in the average, relative to the others' (its number of samples, say); may
            be set anew before any synchronisation. Positive.
        params: the parameters, needed with ``reducer`` only: compressed averaging sends the change since the
            last synchronisation, so all ranks must start equal; the first synchronisation checks that.
        **options: ``transport``, ``module``, ``buffers``, ``reducer``, ``timeout_s`` of
            :class:`~commhooks.averaging.Averager`.

    Example::

        averager = LocalSGD(sync=8, module=model)
        for x, y in loader:
            ...
            optimizer.step()
            averager.average_parameters(model.parameters())

    Raises:
        ValueError: a bad ``sync`` or ``weight``; a reducer without ``params``.
    """

    def __init__(
        self,
        sync: int | SyncSet | Iterable[int],
        *,
        weight: float = 1.0,
        params: Iterable[Tensor] | None = None,
        **options: Any,
    ) -> None:
        self.sync = as_sync_set(sync)
        self.weight = weight
        if not isinstance(weight, (int, float)) or not 0.0 < weight < math.inf:
            raise ValueError(f"weight must be positive and finite, got {weight!r}")
        super().__init__(**options)
        self._anchor: Tensor | None = None
        if self.reducer is not None:
            if params is None:
                raise ValueError(f"params must be given together with a reducer, got {params!r}")
            self._anchor, self._members = torch.empty(0), parameters_of(params)
            self._start_from(self._members)

    def _start_from(self, tensors: Sequence[Tensor]) -> None:
        if self._anchor is not None:
            self._anchor = flatten(tensors, torch.float32)
            self._check_start(self._anchor)

    def is_due(self, step: int) -> bool:
        return step in self.sync

    def settings(self) -> str:
        return f"LocalSGD({self.sync!r}, compressed={self.reducer is not None})"

    def _synchronise(self, tensors: list[Tensor]) -> None:
        if not 0.0 < self.weight < math.inf:
            raise ValueError(f"weight must be positive and finite, got {self.weight!r}")
        weights = self._agree(tensors, note=float(self.weight))
        uniform = all(weight == weights[0] for weight in weights)
        scale = None if uniform else weights[self.rank] / sum(weights)
        if self._anchor is None:
            flat = flatten(tensors, message_dtype(tensors))
            unflatten_(tensors, self._mean(flat, self._what(), scale))
        else:
            if not uniform:
                raise ValueError(f"weight must be equal on all ranks with a reducer, got {weights}")
            delta = flatten(tensors, torch.float32).sub_(self._anchor)
            self._anchor += self._reduce(0, delta, tensors, "parameter", is_last=True)
            unflatten_(tensors, self._anchor)
        self._synchronise_buffers(scale)

    def _shared_state(self) -> dict[str, Any]:
        return {} if self._anchor is None else {"anchor": self._anchor.clone()}

    def _load_shared_state(self, state: dict[str, Any]) -> None:
        if (self._anchor is None) != ("anchor" not in state):
            raise ValueError(
                f"the state was saved {'without' if self._anchor is not None else 'with'} a reducer"
            )
        if self._anchor is not None:
            self._anchor.copy_(state["anchor"])
            self._check_start(self._anchor)
