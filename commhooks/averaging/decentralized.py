"""Momentum SGD among neighbours, no collectives (Yu, Jin, Yang, arXiv:1905.03817, Algorithm 2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import SettingsMismatchError, says_what_to_write
from .agreement import Ranks
from .averager import Averager, AveragerOptions
from .channel import TAG
from .flat import Parameters, flatten, message_dtype, numel_of, shown_layout, tensors_of, unflatten_
from .moments import Choice, Moments
from .sync_sets import Period
from .topology import Topology

if TYPE_CHECKING:
    from typing_extensions import Unpack

_TAG_HEADER, _TAG_DATA = TAG + 10, TAG + 11


class DecentralizedMomentum(Averager):
    """Mixes parameters and momentum buffers with the neighbours' after every step.

    ``x_p = sum_j W[j, p] x~_j``, computed as ``x_p + sum_j W[j, p] (x_j - x_p)``, so that rounded weights
    cannot move workers that agree.

    All messages go point to point to neighbours. A step has ``degree`` messages of parameters and momentum
    buffers (and floating buffers of ``module``), with a header before each.

    The workers' models differ during training. :meth:`average_now` averages them, for instance for an
    evaluation at the end. All should start equal (``broadcast_parameters``), though mixing brings any start
    together.

    Args:
        optimizer: the optimizer that steps: a ``torch.optim.SGD`` in the paper, whose ``nesterov`` chooses
            the option. ``momentum=0``, or ``moments="leave"`` with any optimizer, is D-PSGD.
        topology: the mixing weights (:mod:`commhooks.averaging.topology`), for exactly the transport's ranks.
        period: steps between mixings, 1 in the paper.
        moments: ``"mix"`` (default for SGD): the state that goes with a parameter is mixed too, of any torch
            optimizer: Adam's moments and step counts. ``"leave"``: it stays local.
        **options: of :class:`~commhooks.averaging.Averager`, but no ``reducer``, which reduces over all
            ranks, and no ``buffers="broadcast"``. ``nonfinite`` looks at a rank and its neighbours only.

    Raises:
        ValueError: the topology's size is not the transport's, ``reducer``, ``buffers="broadcast"`` or
            ``dampening`` is given, or an optimizer that is not SGD comes without ``moments``.
    """

    local = True

    @says_what_to_write
    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        topology: Topology,
        *,
        period: Period | None = None,
        moments: Choice | None = None,
        **options: Unpack[AveragerOptions],
    ) -> None:
        if not isinstance(topology, Topology):
            raise ValueError(f"topology must be a Topology, got {topology!r}")
        if options.get("reducer") is not None:
            raise ValueError(
                f"reducer must be None: it reduces over all ranks, not neighbours; got {options['reducer']!r}"
            )
        if options.get("buffers") == "broadcast":
            raise ValueError("buffers must be 'average' or 'leave' without collectives, got 'broadcast'")
        self.optimizer, self._moments = optimizer, Moments(optimizer, moments)
        if period is None and "sync" not in options:
            period = 1
        super().__init__(period, tensors_of(optimizer.param_groups), **options)
        if topology.world_size != self.world_size:
            raise ValueError(f"topology must have the transport's {self.world_size} ranks, got {topology!r}")
        self.topology = topology

    @property
    def options(self) -> list[str]:
        """The paper's option, ``"I"`` (Polyak) or ``"II"`` (Nesterov), for each of SGD's parameter groups."""
        return self._moments.options

    def settings(self) -> dict[str, object]:
        network = f"{self.topology!r} {self.topology.digest:x}"
        return {**self._moments.settings(), "topology": network, **super().settings()}

    def average_now(self, params: Parameters) -> None:
        """Overwrites all ranks' parameters, optimizer state and floating buffers with their plain average.

        A collective call.
        """
        numbers = self._members.see(tensors_of(params))
        with self._communicating(self._tensors(numbers)):
            ranks, part = self._agree(numbers, super()._gather)
            tensors = self._with_state(self._tensors(part))
            super()._average_plainly([*tensors, *self._also], ranks)
            super()._synchronise_buffers(ranks)

    def _everything(self, tensors: list[Tensor]) -> list[Tensor]:
        """Returns all tensors that are sent."""
        return [*self._with_state(tensors), *self._also, *self._buffers.averaged()]

    def _average(self, tensors: list[Tensor], ranks: Ranks) -> None:
        sends, weights = self.topology.neighbours(self.rank, self.synchronisations)
        sources = [(peer, weight) for peer, weight in weights if peer != self.rank]
        everything = self._everything(tensors)
        own = flatten(everything, message_dtype(everything))
        received = own.new_empty(len(sources), own.numel())
        self.transport.exchange(
            [(peer, own) for peer in sends],
            [(peer, row) for (peer, _), row in zip(sources, received, strict=True)],
            tag=_TAG_DATA,
            what=self._what(),
        )
        rows = [(w, row) for (peer, w), row in zip(sources, received) if peer not in ranks.nonfinite]
        in_buffers = ranks.nonfinite_buffers and self._leaves_out_nonfinite
        if self.rank in ranks.nonfinite or in_buffers:
            own = _replaced(own, rows, whole=self.rank in ranks.nonfinite)
        mixed = own.clone()
        for weight, row in rows:
            difference = row - own
            difference[row == own] = 0.0  # of equal infinities too
            if in_buffers:
                difference[~row.isfinite()] = 0.0
            mixed.add_(difference, alpha=weight)
        n = numel_of(tensors)
        self._figures.distance = float(torch.linalg.vector_norm(own[:n] - mixed[:n]))
        unflatten_(everything, mixed)

    def _average_plainly(self, tensors: list[Tensor], ranks: Ranks) -> None:
        """Does nothing: :meth:`_average` has sent everything already."""

    def _synchronise_buffers(self, ranks: Ranks) -> None:
        """Does nothing: :meth:`_average` has sent everything already."""

    def _with_state(self, tensors: list[Tensor]) -> list[Tensor]:
        return [*tensors, *self._moments.of(tensors)]

    def _state_layout(self, tensors: list[Tensor]) -> str:
        return shown_layout(self._moments.of(tensors))

    def _is_in_place(self) -> bool:
        return True  # mixing brings any start together

    def _gather(self, own: Tensor) -> tuple[Tensor, list[int]]:
        """Gathers the headers ``(m, n)`` of this rank and its neighbours, and these ranks.

        Headers have a message of their own, of fixed size: where ranks disagree, data may differ in size.
        """
        sends, weights = self.topology.neighbours(self.rank, self.synchronisations)
        sources = [peer for peer, _ in weights if peer != self.rank]
        received = own.new_empty(len(sources), own.numel())
        self.transport.exchange(
            [(peer, own) for peer in sends],
            [(peer, row) for peer, row in zip(sources, received, strict=True)],
            tag=_TAG_HEADER,
            what=f"{self._what()}, agreement on settings",
        )
        return torch.cat((own[None], received)), [self.rank, *sources]

    def _unite(self, numbers: list[int], part: list[int]) -> list[int]:
        raise SettingsMismatchError(
            f"{self._what()}: rank {self.rank} and its neighbours differ in which parameters take part (here "
            f"{len(part)} of {len(numbers)}): name those that move without a gradient in also="
        )


def _replaced(own: Tensor, rows: list[tuple[float, Tensor]], whole: bool) -> Tensor:
    """Returns ``own`` with the rows' weighted mean for its non-finite elements (all with ``whole``)."""
    total, weight = torch.zeros_like(own), torch.zeros_like(own)
    for w, row in rows:
        finite = row.isfinite()
        total += torch.where(finite, w * row, 0.0)
        weight += torch.where(finite, w, 0.0)
    replace = weight > 0.0 if whole else (weight > 0.0) & ~own.isfinite()
    return torch.where(replace, total / weight, own)
