"""Local SGD: workers step alone and average now and then (Stich, arXiv:1805.09767, Algorithm 1)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import says_what_to_write
from .agreement import Ranks
from .anchored import Anchored
from .averager import AveragerOptions
from .flat import Parameters, flatten, message_dtype, tensors_of, unflatten_
from .sync_sets import Period

if TYPE_CHECKING:
    from typing_extensions import Unpack


class LocalSGD(Anchored):
    """Local SGD: after every step of ``period`` each rank's model becomes the (weighted) average of all.

    The paper's line 8 averages ``x_t``, its equation 4 the iterates *after* the update. The latter is meant
    and done here. ``period=1`` is mini-batch SGD. :class:`~commhooks.averaging.OneShot` is one-shot
    averaging. The local optimizer is free, and its state stays local
    (:class:`~commhooks.averaging.RestartedMomentum` averages momentum too).

    Args:
        period: H, local steps between averagings, a :class:`~commhooks.averaging.SyncSet`, or the steps
            themselves (from 1).
        weight: this worker's share in the average, relative to the others', such as its number of samples.
            Positive. It may be changed before any synchronisation. Equal on all ranks with ``reducer``
            or ``wire``.
        params: the parameters, needed with ``reducer`` or ``wire`` only. Compressed averaging sends the
            change since the last synchronisation, so all ranks must start equal. The first synchronisation
            checks that. Without either it warns of different starts where it knows the parameters: by
            ``params``, ``module``, ``hook`` or ``AveragedOptimizer``.
        **options: of :class:`~commhooks.averaging.Averager`.

    Example::

        averager = LocalSGD(period=8, module=model)
        for x, y in loader:
            ...
            optimizer.step()
            averager.average_parameters(model.parameters())

    Raises:
        ValueError: a bad ``period`` or ``weight``, or a reducer or a wire without ``params``.
    """

    @says_what_to_write
    def __init__(
        self,
        period: Period | None = None,
        *,
        weight: float = 1.0,
        params: Parameters | None = None,
        **options: Unpack[AveragerOptions],
    ) -> None:
        self.weight = weight
        self._weight()
        compressed = any(options.get(name) is not None for name in ("reducer", "wire"))
        if compressed and params is None:
            raise ValueError(f"params must be given together with a reducer or a wire, got {params!r}")
        known = [] if params is None else tensors_of(params)
        super().__init__(period, known, anchored=compressed, **options)

    def _weight(self) -> float:
        if not isinstance(self.weight, (int, float)) or not 0.0 < self.weight < math.inf:
            raise ValueError(f"weight must be positive and finite, got {self.weight!r}")
        return float(self.weight)

    def _average(self, tensors: list[Tensor], ranks: Ranks) -> None:
        if self._change is None:
            own = flatten(tensors, message_dtype(tensors))
            mean = self._channel.mean(own.clone(), self._what(), ranks.share(self.rank))
            self._figures.distance = float(torch.linalg.vector_norm(own.sub_(mean)))
            unflatten_(tensors, mean)
            return
        if not ranks.uniform:
            weights = list(ranks.weights.values())
            raise ValueError(f"weight must be equal on all ranks with a reducer or a wire, got {weights}")
        self._change.anchor += self._mean_change(tensors, ranks)
        self._restart(tensors)
