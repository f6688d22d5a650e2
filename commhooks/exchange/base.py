"""What a Reducer asks of an aggregator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..gradient.sparse_grad import SparseGrad
from ..transports import Transport, check_name, make
from ..wire.message import Context


@dataclass(frozen=True)
class Aggregated:
    """The outcome of one exchange.

    Attributes:
        values: shape ``(m, k)``, float32. The sum over ranks is the sum of the m rows, added in order.
        indices: shape ``(m, k)``, int32, each row ascending and unique, ``PAD`` at unused places.
        contributed: this rank's pairs that are part of the sum.
        refused: this rank's pairs that are not, or None when all are.
        nonfinite: whether any rank reported NaN or Inf. The same on every rank, as ``values`` and ``indices``
            are.
    """

    values: Tensor
    indices: Tensor
    contributed: SparseGrad
    refused: SparseGrad | None
    nonfinite: bool


class Aggregator(ABC):
    """Sums sparse gradients over ranks.

    Args:
        transport: ``"distributed"``, ``"mpi"``, or a ready ``Transport``.
    """

    def __init__(self, transport: str | Transport = "distributed") -> None:
        self.requested = check_name(transport)
        self._transport: Transport | None = transport if isinstance(transport, Transport) else None

    @property
    def transport(self) -> Transport:
        """The open transport.

        Raises:
            RuntimeError: it is not open yet.
        """
        if self._transport is None:
            raise RuntimeError("the transport is not open yet: it opens at the first step or by register()")
        return self._transport

    @property
    def is_open(self) -> bool:
        """Whether the transport is open."""
        return self._transport is not None

    def open(self, *, timeout_s: float, process_group: Any = None, device_type: str = "cpu") -> Transport:
        """Opens the transport, once; a collective call."""
        if self._transport is None:
            self._transport = make(
                self.requested, timeout_s=timeout_s, process_group=process_group, device_type=device_type
            )
        return self._transport

    def close(self) -> None:
        """Closes the transport; the next step opens a new one when it was asked for by name."""
        transport, self._transport = self._transport, None  # gone even if its connections break in closing
        if transport is not None:
            transport.close()

    @abstractmethod
    def aggregate(self, pairs: SparseGrad, nonfinite: bool, context: Context) -> Aggregated:
        """Exchanges ``pairs`` (k the same on all ranks) with all ranks.

        Args:
            pairs: this rank's selection.
            nonfinite: this rank's vote: its gradient held NaN or Inf.
            context: which exchange this is.
        """

    @abstractmethod
    def wire_bytes(self, k: int, world_size: int) -> int:
        """Bytes a rank sends at most for one bucket of ``k`` pairs (formulas in docs/algorithms.md)."""

    def describe(self) -> str:
        """Settings that all ranks must share, in one line."""
        return f"{type(self).__name__}()"

    def __repr__(self) -> str:
        return self.describe()

    def __getstate__(self) -> dict[str, Any]:
        name = self.requested if isinstance(self.requested, str) else self.requested.name
        return {**self.__dict__, "requested": name, "_transport": None}
