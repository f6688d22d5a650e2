"""DiLoCo: a torch optimizer steps on the mean change of a block (Douillard et al., arXiv:2311.08105)."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import says_what_to_write
from .averager import AveragerOptions, StepHook
from .blocks import BlockAverager
from .flat import Parameters, real_view, tensors_of
from .sync_sets import Period

if TYPE_CHECKING:
    from typing_extensions import Unpack

OuterOptimizer = torch.optim.Optimizer | Callable[[list[Tensor]], torch.optim.Optimizer]
"""An optimizer of the model's parameters, or a function that makes one of a list of tensors."""

# What settings() leaves out: tensors, how the step is implemented, and rates, which _varying() has.
_UNSAID = ("params", "lr", "initial_lr", "foreach", "fused")
_DEFAULT = (None, False, 0)  # values of options that settings() leaves out


class DiLoCo(BlockAverager):
    """Every ``sync_every`` steps ``outer_optimizer`` steps on the mean change of the workers' models.

    ``Delta = w~ - mean_p w_p`` is the gradient with which ``outer_optimizer`` moves ``w~``. All ranks restart
    from ``w~``. The names of the arguments are torchft's.

    The paper uses AdamW as inner optimizer, H = 30 to 500, and as outer optimizer
    ``SGD(lr=0.7, momentum=0.9, nesterov=True)``, which is ``b = m b + Delta; w~ = w~ - lr (Delta + m b)``.
    Other outer optimizers give other algorithms:

    - ``SGD(lr=1, momentum=mu)``: M-AVG (:class:`~commhooks.averaging.BlockMomentum`), bit for bit.
    - ``SGD(lr=zeta, momentum=eta, nesterov=True)``: BMUF with Nesterov block momentum and block rate zeta.
    - ``SGD(lr=1)`` with a reducer: SparseLoCo's scheme without its decay.

    A parameter that is frozen loses its outer state, and starts without one when it is unfrozen.

    The outer optimizer steps on float32 copies of the parameters, in which small steps of a half-precision
    model add up. If it was made of the model's parameters, its groups are changed to hold these copies. Its
    settings, state, ``state_dict`` and schedulers work as before, and its state is saved with the averager's.
    With ``outer_optimizer.register_step_post_hook(lambda *_: scheduler.step())`` a scheduler of the outer
    rate steps once at each synchronisation.

    Args:
        params: the model's parameters at the start of the first block: they are the first ``w~``.
        outer_optimizer: a torch optimizer of these parameters, or a function that makes one of a list of
            tensors.
        sync_every: H, local steps between synchronisations, a :class:`~commhooks.averaging.SyncSet`, or
            the steps themselves (from 1).
        inner_optimizer: inside ``with DiLoCo(...):`` each of its steps is followed by
            :meth:`~commhooks.averaging.Averager.average_parameters`.
        reset_optimizer: an optimizer whose state is cleared at every restart.
        **options: of :class:`~commhooks.averaging.Averager`. With a reducer ``w_p - w~`` is
            compressed, and what was not sent waits in the reducer's memory. The mean is over all workers. The
            outer rate is applied once, at the outer step.

    Attributes:
        outer_optimizer: the optimizer, for schedulers.

    Example::

        outer = torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9, nesterov=True)
        with DiLoCo(model.parameters(), outer, sync_every=30, inner_optimizer=optimizer):
            for x, y in loader:
                ...
                optimizer.step()

    Raises:
        ValueError: no parameters, one that the outer optimizer lacks, or a bad ``sync_every``.
    """

    _period_name = "sync_every"

    @says_what_to_write
    def __init__(
        self,
        params: Parameters,
        outer_optimizer: OuterOptimizer,
        *,
        sync_every: Period,
        inner_optimizer: torch.optim.Optimizer | None = None,
        reset_optimizer: torch.optim.Optimizer | None = None,
        **options: Unpack[AveragerOptions],
    ) -> None:
        tensors = tensors_of(params)
        super().__init__(sync_every, tensors, reset_optimizer=reset_optimizer, **options)
        self.inner_optimizer = inner_optimizer
        self._hook: StepHook | None = None
        self._copies: dict[int, Tensor] = {}  # by number: what the outer optimizer holds
        if isinstance(outer_optimizer, torch.optim.Optimizer):
            self.outer_optimizer = outer_optimizer
        else:
            self.outer_optimizer = outer_optimizer(self._make_copies())
        self._point_outer_optimizer()

    def settings(self) -> dict[str, object]:
        groups = [
            ", ".join(f"{k}={v}" for k, v in group.items() if k not in _UNSAID and v not in _DEFAULT)
            for group in self.outer_optimizer.param_groups
        ]
        outer = f"{type(self.outer_optimizer).__name__}({'; '.join(groups)})"
        return {"outer_optimizer": outer, **super().settings()}

    def _varying(self) -> dict[str, object]:
        return {"outer rates": [float(group["lr"]) for group in self.outer_optimizer.param_groups]}

    def __enter__(self) -> DiLoCo:
        if self.inner_optimizer is None:
            raise ValueError("with DiLoCo(...) needs inner_optimizer, got None")
        self._hook = self.hook(self.inner_optimizer)
        return self

    def __exit__(self, *error: object) -> None:
        if self._hook is not None:
            self._hook.remove()

    def _move_anchor(self, change: Tensor) -> None:
        assert self._change is not None
        for number, gradient in self._change.split(change.neg_()).items():
            copy = self._copies[number]
            copy.grad = gradient.view(copy.shape)
        held = [p for group in self.outer_optimizer.param_groups for p in group["params"]]
        copies = {id(self._copies[number]) for number in self._change.numbers}
        # Frozen and new parameters take no part in the outer step, which must see no gradient of theirs.
        others = [(p, p.grad) for p in held if id(p) not in copies]
        for parameter, _ in others:
            parameter.grad = None
        with torch.enable_grad():  # as in a training loop: optimizers switch it off themselves
            self.outer_optimizer.step()
        for copy in self._copies.values():
            copy.grad = None
        for parameter, gradient in others:
            parameter.grad = gradient

    # -- the outer optimizer's tensors: parameters that share the anchor's memory ---------------------------

    def _make_copies(self) -> list[Tensor]:
        """Makes a parameter in the anchor's memory for each of its tensors. Existing ones are kept."""
        assert self._change is not None
        for number, piece in self._change.split(self._change.anchor).items():
            piece = piece.view(real_view(self._members.tensors[number]).shape)
            if number in self._copies:
                self._copies[number].data = piece
            else:
                self._copies[number] = torch.nn.Parameter(piece)
        return [self._copies[number] for number in self._change.numbers]

    def _point_outer_optimizer(self) -> None:
        """Replaces the model's parameters by the copies in the outer optimizer's groups and state."""
        assert self._change is not None
        self._make_copies()
        copy_of = {id(self._members.tensors[n]): self._copies[n] for n in self._change.numbers}
        held: set[int] = set()
        for group in self.outer_optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in copy_of and parameter in self.outer_optimizer.state:
                    copy = copy_of[id(parameter)]
                    self.outer_optimizer.state[copy] = self.outer_optimizer.state.pop(parameter)
            group["params"] = [copy_of.get(id(p), p) for p in group["params"]]
            held.update(id(p) for p in group["params"])
        lacking = [n for n in self._change.numbers if id(self._copies[n]) not in held]
        if lacking:
            shape = tuple(self._members.tensors[lacking[0]].shape)
            raise ValueError(
                f"outer_optimizer must hold every parameter that is averaged; it lacks {len(lacking)}, "
                f"such as one of shape {shape}: add them by add_param_group"
            )

    def _lay_out(self, numbers: list[int]) -> None:
        assert self._change is not None
        for number in set(self._change.numbers) - set(numbers):  # as BlockMomentum forgets its velocity
            self.outer_optimizer.state.pop(self._copies[number], None)
        super()._lay_out(numbers)
        self._point_outer_optimizer()

    def _start_from(self, numbers: list[int]) -> None:
        super()._start_from(numbers)
        self._point_outer_optimizer()
        self.outer_optimizer.state.clear()

    def _shared_state(self) -> dict[str, Any]:
        return {**super()._shared_state(), "outer": deepcopy(self.outer_optimizer.state_dict())}

    def _load_shared_state(self, state: dict[str, Any]) -> None:
        super()._load_shared_state(state)
        self._point_outer_optimizer()
        # a copy, as torch would go on in the saved tensors
        self.outer_optimizer.load_state_dict(deepcopy(state["outer"]))
