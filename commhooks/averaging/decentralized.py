"""Momentum SGD among neighbours, no collectives (Yu, Jin, Yang, arXiv:1905.03817, Algorithm 2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..exchange.agreement import compare, encode
from .flat import digest, flatten, message_dtype, parameters_of, unflatten_
from .restarted_momentum import MomentumAverager
from .sync_sets import Every, positive_int
from .topology import Topology

_TAG_HEADER, _TAG_DATA = 7010, 7011


class DecentralizedMomentum(MomentumAverager):
    """After every step parameters and momentum buffers are mixed with the neighbours': ``x_p = sum_j W[j, p]
    x~_j``.

    Point-to-point messages to the neighbours only: ``degree`` messages of parameters + momentum buffers (+
    floating buffers of ``module``) a step, with a message of settings in front of each. Written as ``x_p +
    sum_j W[j, p] (x_j - x_p)``, so that rounded weights cannot move workers that agree.

    The workers' models differ during training; :meth:`average_now` averages them, for evaluation at the end,
    say. All should start equal (``broadcast_parameters``), though mixing brings any start together.

    Args:
        optimizer: the ``torch.optim.SGD`` that steps; ``nesterov`` chooses the paper's option.
        topology: whom to talk to (:mod:`commhooks.averaging.topology`), for exactly the transport's ranks.
        period: steps between mixings; the paper's is 1.
        **options: ``transport``, ``module``, ``buffers`` (not ``"broadcast"``), ``timeout_s`` of
            :class:`~commhooks.averaging.Averager`. No ``reducer``: it reduces over all ranks.

    Raises:
        ValueError: the topology's size is not the transport's, or one of the above.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, topology: Topology, *, period: int = 1, **options: Any
    ) -> None:
        if not isinstance(topology, Topology):
            raise ValueError(f"topology must be a Topology, got {topology!r}")
        self.sync = Every(positive_int("period", period))
        super().__init__(optimizer, **options)
        if self.reducer is not None:
            raise ValueError(
                f"reducer must be None: it reduces over all ranks, not neighbours; got {self.reducer!r}"
            )
        if self.buffers == "broadcast":
            raise ValueError(
                f"buffers must be 'average' or 'leave' without collectives, got {self.buffers!r}"
            )
        if topology.world_size != self.world_size:
            raise ValueError(f"topology must have the transport's {self.world_size} ranks, got {topology!r}")
        self.topology = topology

    def is_due(self, step: int) -> bool:
        return step in self.sync

    def settings(self) -> str:
        weights = digest(*(m.tolist() for m in self.topology.matrices))
        return f"{super().settings()} every {self.sync.period} on {self.topology!r} {weights:x}"

    def average_now(self, params: Any) -> None:
        """Makes all ranks' parameters, momentum buffers and floating buffers the plain average."""
        tensors = parameters_of(params)
        with self._reporting():
            self._agree(tensors)
            both = [*tensors, *self._momenta(tensors)]
            flat = flatten(both, message_dtype(both))
            unflatten_(both, self._mean(flat, self._what()))
            self._synchronise_buffers()

    def _synchronise(self, tensors: list[Tensor]) -> None:
        sends, weights = self.topology.neighbours(self.rank, self.synchronisations)
        sources = [(peer, weight) for peer, weight in weights if peer != self.rank]
        everything = [*tensors, *self._momenta(tensors), *self._buffers()]
        self._agree_with(everything, sends, [peer for peer, _ in sources])
        own = flatten(everything, message_dtype(everything))
        received = own.new_empty((len(sources), own.numel()))
        self.transport.exchange(
            [(peer, own) for peer in sends],
            [(peer, row) for (peer, _), row in zip(sources, received, strict=True)],
            tag=_TAG_DATA,
            what=self._what(),
        )
        mixed = own.clone()
        for (_, weight), row in zip(sources, received, strict=True):
            mixed.add_(row.sub_(own), alpha=weight)
        unflatten_(everything, mixed)

    def _agree_with(self, tensors: list[Tensor], sends: list[int], sources: list[int]) -> None:
        """Compares settings, shapes and step with these neighbours.

        A message of its own, of fixed size: if shapes differ, the data would not fit.
        """
        messages = encode(self._common(tensors)).repeat(1 + len(sources), 1)
        self.transport.exchange(
            [(peer, messages[0]) for peer in sends],
            [(peer, row) for peer, row in zip(sources, messages[1:], strict=True)],
            tag=_TAG_HEADER,
            what=f"{self._what()}, agreement",
        )
        compare(messages, self.rank, self._what(), ranks=[self.rank, *sources])
