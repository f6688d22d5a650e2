"""Base of the averagers that remember the ranks' last common model and send the change since."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..errors import SettingsMismatchError
from .agreement import Ranks
from .averager import Averager, AveragerOptions
from .compressed_change import CompressedChange
from .flat import flatten
from .sync_sets import Period

if TYPE_CHECKING:
    from typing_extensions import Unpack

logger = logging.getLogger(__name__)


class Anchored(Averager):
    """Base of the averagers with an anchor: the model that all ranks had in common last.

    A tensor that joins later has no anchor yet. Its first synchronisation averages it plainly, and the result
    is its anchor. A tensor that leaves loses its anchor.

    Args:
        period: as for :class:`Averager`.
        known: the tensors, at the common starting point. They are the anchor.
        anchored: False: have no anchor, and average the models themselves.
        **options: of :class:`Averager`.

    Raises:
        ValueError: no tensor requires a gradient; what :class:`Averager` raises.
    """

    beside: ClassVar[tuple[str, ...]] = ()
    """Attribute names of the algorithm's own flat tensors, laid out as the anchor; zero at a start."""

    def __init__(
        self,
        period: Period | None,
        known: Sequence[Tensor],
        *,
        anchored: bool = True,
        **options: Unpack[AveragerOptions],
    ) -> None:
        super().__init__(period, known, **options)
        self._change: CompressedChange | None = None
        self._compares_start = anchored
        if anchored:
            numbers = self._members.trained(range(len(known)))
            if not numbers:
                raise ValueError("params must hold at least one parameter that requires a gradient, got none")
            self._change = CompressedChange(self.reducer, self._tensors(numbers), numbers)
            self._set_beside([torch.zeros_like(self._change.anchor) for _ in self.beside])

    def _set_beside(self, tensors: list[Tensor]) -> None:
        for name, tensor in zip(self.beside, tensors, strict=True):
            setattr(self, name, tensor)

    def _mean_change(self, tensors: list[Tensor], ranks: Ranks) -> Tensor:
        """The ranks' mean change since the anchor, a new ``(n,)``; by the reducer where there is one."""
        change = self._change
        assert change is not None
        if self.reducer is not None:
            own = torch.zeros_like(change.anchor) if self.rank in ranks.nonfinite else change.of(tensors)
            mean = change.reduce(own.clone())
        else:
            flat = flatten(tensors, change.anchor.dtype)
            own = flat - change.anchor
            mean = self._channel.mean(flat, self._what(), ranks.share(self.rank)).sub_(change.anchor)
        self._figures.distance = float(torch.linalg.vector_norm(own.sub_(mean)))
        return mean

    # -- membership ------------------------------------------------------------------------------------------

    def _divide(self, part: list[int]) -> tuple[list[int], list[int]]:
        if self._change is None:
            return super()._divide(part)
        anchored = set(self._change.numbers)
        return [n for n in part if n in anchored], [n for n in part if n not in anchored]

    def _check_members(self, numbers: list[int]) -> None:
        if self._change is not None and not set(self._change.numbers) <= set(numbers):
            given = sum(t.numel() for t in self._tensors(numbers))
            raise ValueError(
                f"params must be the {self._change.anchor.numel()} elements the averager was made with, "
                f"got {given}"
            )

    def _averaged(self, part: list[int]) -> None:
        numbers = self._members.trained(part)
        if self._change is not None and numbers != self._change.numbers:
            self._relay(numbers)

    def _relay(self, numbers: list[int]) -> None:
        """Lays the anchor out anew for these tensors."""
        assert self._change is not None
        gone = [n for n in self._change.numbers if n not in numbers]
        if gone and self.reducer is not None:
            logger.warning(
                "%s: tensors %s are trained no more; what of their change is withheld stays in the memory",
                self._what(),
                gone,
            )
        others = [getattr(self, name) for name in self.beside]
        self._set_beside(self._change.relay(numbers, self._tensors(numbers), *others))

    # -- the starting point ----------------------------------------------------------------------------------

    def _start_from(self, numbers: list[int]) -> None:
        super()._start_from(numbers)
        if self._change is not None:
            numbers = self._members.trained(numbers)
            self._check_members(numbers)
            self._change.start_from(self._tensors(numbers), numbers)
            self._set_beside([torch.zeros_like(self._change.anchor) for _ in self.beside])
            self._compares_start = True
            if self.reducer is not None:
                self._forget_withheld()

    def _forget_withheld(self) -> None:
        assert self.reducer is not None
        table = self.reducer.memory.table
        if table.residual_norm() > 0.0:
            logger.warning("%s: a residual of norm %.3g is dropped", self._what(), table.residual_norm())
        table.forget()

    def _starting_point(self) -> int:
        if self._change is None:
            return super()._starting_point()
        return self._change.digest() if self._compares_start else 0

    def _start_compared(self) -> None:
        super()._start_compared()
        self._compares_start = False

    def _starts_differ(self) -> None:
        if self._change is None:
            super()._starts_differ()
            return
        raise SettingsMismatchError(
            f"{self._what()}: the ranks differ in starting point: call broadcast_parameters first, or load "
            f"the averagers' states; this is rank {self.rank} with {self.settings()}"
        )

    def _is_in_place(self) -> bool:
        if self._change is None:
            return super()._is_in_place()
        return self._change.is_at(self._tensors(self._change.numbers))

    # -- state -----------------------------------------------------------------------------------------------

    def _shared_state(self) -> dict[str, Any]:
        if self._change is None:
            return {}
        return {**self._change.state_dict(), **{name: getattr(self, name).clone() for name in self.beside}}

    def _load_shared_state(self, state: dict[str, Any]) -> None:
        if (self._change is None) != ("anchor" not in state):
            raise ValueError(
                f"the state was saved {'without' if self._change is not None else 'with'} a reducer"
            )
        if self._change is not None:
            self._change.load_state_dict(state)
            anchor = self._change.anchor
            self._set_beside([state[name].to(anchor.device, anchor.dtype, copy=True) for name in self.beside])
            self._compares_start = True
