"""What a Reducer asks of an aggregator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..gradient.sparse_grad import SparseGrad
from ..transports import Transport, check_name
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
        transport: ``"distributed"``, ``"mpi"``, or a ready ``Transport``. The Reducer opens it.

    Attributes:
        requested: the transport that was asked for. Pickled as a name.
    """

    def __init__(self, transport: str | Transport = "distributed") -> None:
        self.requested = check_name(transport)

    @abstractmethod
    def aggregate(
        self, transport: Transport, pairs: SparseGrad, nonfinite: bool, context: Context
    ) -> Aggregated:
        """Exchanges ``pairs`` (k the same on all ranks) with all ranks.

        Args:
            transport: connects the ranks.
            pairs: this rank's selection. The result is on the same device.
            nonfinite: this rank's vote: its gradient held NaN or Inf.
            context: which exchange this is.
        """

    @abstractmethod
    def wire_bytes(self, k: int, world_size: int) -> int:
        """Bytes a rank sends at most for one bucket of ``k`` pairs (formulas in docs/algorithms.md)."""

    def settings(self) -> dict[str, object]:
        """What all ranks must share, by argument."""
        return {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in self.settings().items())})"

    def __getstate__(self) -> dict[str, Any]:
        name = self.requested if isinstance(self.requested, str) else self.requested.name
        return {**self.__dict__, "requested": name}
