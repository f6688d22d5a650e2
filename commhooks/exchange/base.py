"""``Aggregator``, which sums the ranks' selections for a Reducer, and ``Aggregated``, its result."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..errors import says_what_to_write
from ..gradient.sparse_grad import SparseGrad
from ..transports import Transport, check_name
from ..wire.message import Context


@dataclass(frozen=True)
class Aggregated:
    """The outcome of one exchange.

    Attributes:
        values: shape ``(m, k)``, float32. The sum over ranks is the sum of the m rows, added in order. m is
            the world size for ``AllGather`` and 1 for the others.
        indices: shape ``(m, k)``, int32, each row ascending and unique, ``PAD`` at unused places.
        contributed: this rank's pairs that are part of the sum.
        refused: this rank's pairs that are not part of the sum. None: there are none.
        nonfinite: whether any rank reported NaN or Inf.

    ``values``, ``indices`` and ``nonfinite`` are the same on every rank.
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
        requested: the argument ``transport``. It is pickled as a name.
        takes_selection: whether it sums the pairs of a selector. False: it takes whole vectors.
    """

    takes_selection: ClassVar[bool] = True

    @says_what_to_write
    def __init__(self, transport: str | Transport = "distributed") -> None:
        self.requested = check_name(transport)

    @abstractmethod
    def aggregate(
        self, transport: Transport, pairs: SparseGrad, nonfinite: bool, context: Context
    ) -> Aggregated:
        """Sums the ranks' pairs. A collective call.

        Args:
            transport: connects the ranks.
            pairs: this rank's selection; k is the same on all ranks. The result is on the same device.
            nonfinite: this rank's vote: whether its gradient held NaN or Inf.
            context: which exchange this is.

        Raises:
            SettingsMismatchError: another rank is at another bucket or step, or sends another number of
                pairs, now or at the next step.
            PeerTimeoutError, PeerLostError: a rank is missing.
        """

    @abstractmethod
    def wire_bytes(self, k: int, world_size: int) -> int:
        """Returns the bytes a rank sends at most for a bucket of ``k`` pairs (see docs/algorithms.md)."""

    def settings(self) -> dict[str, object]:
        """Returns the settings that must be equal on all ranks, by argument name."""
        return {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in self.settings().items())})"

    def __getstate__(self) -> dict[str, Any]:
        name = self.requested if isinstance(self.requested, str) else self.requested.name
        return {**self.__dict__, "requested": name}
