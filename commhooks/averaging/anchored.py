"""Base of the averagers that remember the ranks' last common model and send the change since."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..errors import SettingsMismatchError
from .agreement import Ranks
from .averager import Averager, AveragerOptions
from .compressed_change import CompressedChange
from .flat import Parameters, checksum, flatten, pieces, real_view, tensors_of, unflatten_
from .sync_sets import Period
from .wired_change import WiredChange

if TYPE_CHECKING:
    from typing_extensions import Unpack

logger = logging.getLogger(__name__)


class Anchored(Averager):
    """Base of the averagers with an anchor: the model that all ranks had in common last.

    A tensor that joins later has no anchor yet. Its first synchronisation averages it plainly, and the result
    is its anchor. A tensor that leaves loses its anchor.

    With a ``wire``, ``w_p - A`` of rank p's model and the anchor A is sent in few bits, A moves by the mean,
    and ``w_p = A + e_p``, where ``e_p`` is what was not sent. So the next change holds it, and there is no
    other memory of it. A tensor that leaves is averaged uncompressed, and what was withheld of it arrives.

    Args:
        period: as for :class:`Averager`.
        known: the tensors, at the common starting point. They are the anchor.
        anchored: False: have no anchor, and average the models themselves.
        **options: of :class:`Averager`.

    Raises:
        ValueError: no tensor requires a gradient, or what :class:`Averager` raises.
    """

    beside: ClassVar[tuple[str, ...]] = ()
    """Attribute names of the algorithm's own flat tensors, laid out as the anchor; zero at a start."""
    _takes_wire = True

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
        self._wired = None if self.wire is None else WiredChange(self.wire)
        self._withheld: Tensor | None = None  # between the exchange and the restart
        # Checksum of the model as the last synchronisation left it or the loaded state was saved with.
        self._left: int | None = None
        self._compares_start = anchored
        self._told = False  # that the model moves without a torch optimizer
        if anchored:
            numbers = self._members.trained(range(len(known)))
            if not numbers:
                raise ValueError("params must hold at least one parameter that requires a gradient, got none")
            self._change = CompressedChange(
                self.reducer, self._tensors(numbers), numbers, narrow=self._wired is not None
            )
            self._set_beside([torch.zeros_like(self._change.anchor) for _ in self.beside])

    def _set_beside(self, tensors: list[Tensor]) -> None:
        for name, tensor in zip(self.beside, tensors, strict=True):
            setattr(self, name, tensor)

    @contextmanager
    def common_model(self, params: Parameters | None = None) -> Iterator[None]:
        """Makes the parameters the anchor inside the ``with`` block: the model that all ranks have in common.

        It is the model to evaluate and to save, since with a wire, and between synchronisations, every rank
        has a model of its own. Afterwards the parameters are as they were before, bit for bit. It takes a
        copy of the parameters, and is not collective. Buffers are this rank's.

        A checkpoint to resume from has each rank's own model: take it outside of the block.

        Args:
            params: the model's parameters. They are needed where others have taken their place since the last
                call, as by ``load_state_dict(..., assign=True)``, and the averager has no ``module=``.

        Raises:
            RuntimeError: the averager has no anchor (``LocalSGD`` without a reducer or a wire). Inside the
                block: a local step, a synchronisation, a broadcast, and saving or loading the state.
        """
        if self._change is None:
            raise RuntimeError(
                f"{type(self).__name__} has no common model of its own: the ranks have it right after a "
                "synchronisation"
            )
        self._see_again(params)
        tensors = self._tensors(self._change.numbers)
        own = [tensor.detach().clone() for tensor in tensors]
        before, self._shows_common = self._shows_common, True
        unflatten_(tensors, self._change.anchor)
        try:
            yield
        finally:
            self._shows_common = before
            with torch.no_grad():
                for tensor, value in zip(tensors, own, strict=True):
                    tensor.copy_(value)

    def _see_again(self, params: Parameters | None) -> None:
        """Takes note of parameters that have taken the place of those seen last."""
        if params is not None:
            self._members.see(tensors_of(params))
        elif self.module is not None:
            now, known = list(self.module.parameters()), self._members.tensors
            gone = {id(tensor) for tensor in known} - {id(tensor) for tensor in now}
            if gone and len(now) == len(known):
                self._members.see(now)

    def _mean_change(self, tensors: list[Tensor], ranks: Ranks) -> Tensor:
        """Returns the ranks' mean change since the anchor, ``(n,)``, by wire or reducer if there is one."""
        change = self._change
        assert change is not None
        if self._wired is not None:
            return self._mean_by_wire(self._wired, tensors, ranks)
        if self.reducer is not None:
            own = torch.zeros_like(change.anchor) if self.rank in ranks.nonfinite else change.of(tensors)
            mean = change.reduce(own.clone())
        else:
            flat = flatten(tensors, change.anchor.dtype)
            own = flat - change.anchor
            mean = self._channel.mean(flat, self._what(), ranks.share(self.rank)).sub_(change.anchor)
        self._figures.distance = float(torch.linalg.vector_norm(own.sub_(mean)))
        return mean

    def _mean_by_wire(self, wired: WiredChange, tensors: list[Tensor], ranks: Ranks) -> Tensor:
        """Returns :meth:`_mean_change` by the wire. What was not sent waits for :meth:`_restart`."""
        assert self._change is not None
        anchor, left_out = self._change.anchor, self.rank in ranks.nonfinite
        own = torch.zeros_like(anchor) if left_out else self._change.of(tensors)
        propagate = self._nonfinite == "propagate"
        mean = wired.mean(self.transport, own, self.step, self._what(), propagate)
        self._withheld = own
        if left_out:
            self._figures.distance = float(torch.linalg.vector_norm(mean))
        else:  # tensor by tensor: no further vector of the model's size
            parts = zip(tensors, pieces(anchor, tensors), pieces(mean, tensors), strict=True)
            norms = [torch.linalg.vector_norm(real_view(t).reshape(-1) - a - m) for t, a, m in parts]
            self._figures.distance = float(torch.linalg.vector_norm(torch.stack(norms)))
        return mean

    def _restart(self, tensors: list[Tensor]) -> None:
        """Makes the tensors the anchor, plus what the wire did not send of this rank's change."""
        assert self._change is not None
        withheld, self._withheld = self._withheld, None
        anchor = self._change.anchor
        unflatten_(tensors, anchor if withheld is None else withheld.add_(anchor))

    # -- membership ------------------------------------------------------------------------------------------

    def _divide(self, part: list[int]) -> tuple[list[int], list[int]]:
        if self._change is None:
            return super()._divide(part)
        anchored = set(self._change.numbers)
        if self._wired is not None:  # what leaves is averaged uncompressed: nothing of it stays withheld
            anchored = {n for n in anchored if self._members.tensors[n].requires_grad}
        return [n for n in part if n in anchored], [n for n in part if n not in anchored]

    def _before_average(self, main: list[int]) -> None:
        if self._wired is not None and self._change is not None and main != self._change.numbers:
            self._lay_out(main)

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
            self._lay_out(numbers)
        if self._change is not None:
            self._left = None if self._wired is None else checksum(self._tensors(self._change.numbers))

    def _lay_out(self, numbers: list[int]) -> None:
        """Lays the anchor out anew for these tensors."""
        assert self._change is not None
        if self._wired is not None:
            self._wired.hand_over(self._tensors(self._change.numbers), self.world_size)
        gone = [n for n in self._change.numbers if n not in numbers]
        if gone and self.reducer is not None:
            logger.warning(
                "%s: tensors %s are trained no more; what of their change is withheld stays in the memory",
                self._what(),
                gone,
            )
        others = [getattr(self, name) for name in self.beside]
        self._set_beside(self._change.lay_out(numbers, self._tensors(numbers), *others))

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
            self._left = None
            if self._wired is not None:
                if bool(self._wired.owned.any()):
                    norm = float(torch.linalg.vector_norm(self._wired.owned))
                    logger.warning(
                        "%s: what was withheld on the wire is dropped; this rank's chunk has the norm %.3g",
                        self._what(),
                        norm,
                    )
                self._wired.forget()

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
            f"the averagers' states; this is rank {self.rank} with {self._shown()}"
        )

    def _is_in_place(self) -> bool:
        if self._change is None:
            return super()._is_in_place()
        tensors = self._tensors(self._change.numbers)
        return self._change.is_at(tensors) if self._left is None else self._left == checksum(tensors)

    def _no_step_seen(self) -> None:
        if self._change is None or self._told or self._is_in_place():
            return
        self._told = True
        logger.warning(
            "%s: the model is not where the averager left it, and no torch optimizer of its parameters has "
            "stepped. What was changed counts as local steps. After loading weights call "
            "broadcast_parameters, or load the averager's state too. This is said once",
            self._what(),
        )

    # -- state -----------------------------------------------------------------------------------------------

    def _shared_state(self) -> dict[str, Any]:
        if self._change is None:
            return {}
        return {**self._change.state_dict(), **{name: getattr(self, name).clone() for name in self.beside}}

    def _load_shared_state(self, state: dict[str, Any]) -> None:
        if (self._change is None) != ("anchor" not in state):
            raise ValueError(
                f"the state was saved {'without' if self._change is not None else 'with'} a reducer or a wire"
            )
        if self._change is not None:
            self._change.load_state_dict(state)
            anchor = self._change.anchor
            self._set_beside([state[name].to(anchor.device, anchor.dtype, copy=True) for name in self.beside])
            self._compares_start = True

    def _own_state(self) -> dict[str, Any]:
        if self._change is None:
            return {}
        # The checksum tells after loading whether the model is the one that was saved.
        own: dict[str, Any] = {"model": checksum(self._tensors(self._change.numbers))}
        if self._wired is not None:
            own["wire"] = self._wired.state_dict()
        return own

    def _load_own_state(self, state: dict[str, Any]) -> None:
        self._left, saved = state.get("model"), state.get("wire")
        if self._left is not None:
            self._expect_steps()
        if self._wired is not None and self._change is not None:
            self._wired.forget()
            if saved is not None:
                numel = self._change.anchor.numel()
                self._wired.load_state_dict(saved, numel, self.rank, self.world_size)
        elif saved is not None and bool(saved["owned"].any()):
            logger.warning(
                "%s: what the saved wire's owner kept, of norm %.3g, is dropped: there is no wire here",
                self._what(),
                float(torch.linalg.vector_norm(saved["owned"])),
            )
