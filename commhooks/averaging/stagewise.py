"""Stagewise M-DSGD: a constant rate per stage, proximal term, fresh memory (arXiv:1905.12960, section 6)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import says_what_to_write
from .flat import flatten, tensors_of, unflatten_
from .sync_sets import positive_int

if TYPE_CHECKING:
    from ..ddp.state import SparseState
    from ..reduction.reducer import Reducer

logger = logging.getLogger(__name__)


class Stagewise:
    """Runs M-DSGD (the sparse hook, with its memory and momentum) in stages, with a proximal term.

    The objective of stage s is ``F(w) + ||w - w~_s||^2 / (2 gamma)``.

    Stage s = 0, 1, ... starts from ``w~_s`` with fresh memory and velocity, takes ``T_s`` steps at the
    constant rate ``eta_s = eta0 / (s + 1)`` with ``eta_s T_s >= 12 gamma``, and ends at the average of its
    iterates ``w_0 .. w_{T_s - 1}`` (eq. 15 and 16, Theorem 12). Add :meth:`penalty` to every loss, so that
    the proximal gradient enters the memory with the rest of the gradient, and call :meth:`step` after every
    optimizer step.

    A new stage drops what was withheld, as the paper defines it. :attr:`withheld` records how much.

    Args:
        optimizer: SGD without momentum (the memory has it). Its ``lr`` is overwritten at each stage.
        state: the ``SparseState`` of the hook, or a ``Reducer``. Its memory is emptied at the end of each
            stage. None: a dense run.
        gamma: of the proximal term, below ``1 / c`` for a c-weakly convex F. The theorem takes ``1 / (2 c)``.
        eta0: learning rate of the first stage.
        stage_steps: T_s as a function of s. None: the smallest that the theorem allows.
        weak_convexity: c, against which ``gamma`` is checked. None: unknown.

    Attributes:
        stage: s, the stage the next step belongs to.
        stage_step: steps done in it.
        withheld: norm of this rank's residual that each finished stage dropped, in gradient units.

    Example::

        stages = Stagewise(optimizer, state, gamma=0.5, eta0=0.1)
        for x, y in loader:
            (loss_fn(ddp(x), y) + stages.penalty()).backward()
            optimizer.step()
            stages.step()

    Raises:
        ValueError: an argument out of range, an optimizer with momentum, or a stage shorter than the theorem
            allows.
    """

    @says_what_to_write
    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        state: SparseState | Reducer | None = None,
        *,
        gamma: float,
        eta0: float,
        stage_steps: Callable[[int], int] | None = None,
        weak_convexity: float | None = None,
    ) -> None:
        for name, value in (("gamma", gamma), ("eta0", eta0)):
            if not 0.0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value!r}")
        if weak_convexity is not None and not gamma * weak_convexity < 1.0:
            raise ValueError(
                f"gamma must be below 1 / weak_convexity = {1 / weak_convexity:g}, got {gamma!r}"
            )
        for group in optimizer.param_groups:
            if group.get("momentum", 0.0) != 0.0:
                raise ValueError(f"the optimizer's momentum must be 0, got {group['momentum']!r}")
        self.optimizer, self.gamma, self.eta0 = optimizer, float(gamma), float(eta0)
        self.tensors = [
            t for t in tensors_of(optimizer.param_groups) if t.is_floating_point() or t.is_complex()
        ]
        self._reducer: Any = getattr(state, "reducer", state)
        self._stage_steps = stage_steps
        self.stage, self.stage_step = 0, 0
        self.withheld: list[float] = []
        self.anchor = [t.detach().clone() for t in self.tensors]
        self._sum = flatten(self.tensors, torch.float64)
        self._fresh = True  # whether the model should be at the anchor
        self.apply_rate()

    @property
    def rate(self) -> float:
        """eta_s of the present stage."""
        return self.eta0 / (self.stage + 1)

    def steps_of(self, stage: int) -> int:
        """T_s of a stage."""
        rate = self.eta0 / (stage + 1)
        least = math.ceil(12.0 * self.gamma / rate * (1 - 1e-12))
        if self._stage_steps is None:
            return least
        steps = positive_int(f"stage_steps({stage})", self._stage_steps(stage))
        if steps < least:
            raise ValueError(f"stage_steps({stage}) must be at least 12 gamma / eta_s = {least}, got {steps}")
        return steps

    def penalty(self) -> Tensor:
        """Returns ``||w - w~_s||^2 / (2 gamma)``, a scalar with a graph. Add it to this rank's loss.

        Leave DDP's ``find_unused_parameters=True`` off: DDP would take parameters that only this term uses
        for unused.
        """
        if self._fresh:
            self._look_for_the_start()
        squares = [
            (t - a).abs().square().sum()
            for t, a in zip(self.tensors, self.anchor, strict=True)
            if t.requires_grad
        ]
        if not squares:  # everything is frozen
            return torch.zeros((), dtype=torch.float32, device=self.tensors[0].device)
        return torch.stack(squares).sum() / (2.0 * self.gamma)

    def _look_for_the_start(self) -> None:
        """Starts the stage from the model as it is now, where weights were loaded since it was made."""
        self._fresh = False
        if all(torch.equal(t, a) for t, a in zip(self.tensors, self.anchor, strict=True)):
            return
        if self.stage > 0:
            logger.warning("stage %d starts from another model than the last one ended with", self.stage)
        self._start()

    def _start(self) -> None:
        for anchor, tensor in zip(self.anchor, self.tensors, strict=True):
            anchor.copy_(tensor.detach())
        self._sum = flatten(self.tensors, torch.float64)

    def step(self) -> bool:
        """Counts an optimizer step, and overwrites the parameters at the end of a stage with its average.

        It does not communicate: the ranks' parameters are equal, so their averages are too.

        Returns:
            Whether a stage ended.
        """
        self.stage_step += 1
        self._fresh = False
        length = self.steps_of(self.stage)
        if self.stage_step < length:
            self._sum += flatten(self.tensors, torch.float64)
            return False
        unflatten_(self.tensors, self._sum / length)
        self._forget()
        self.stage, self.stage_step = self.stage + 1, 0
        self._start()
        self._fresh = True
        self.apply_rate()
        return True

    def _forget(self) -> None:
        """Empties memory and velocity, and records the norm of what is dropped."""
        if self._reducer is None:
            return
        table = self._reducer.memory.table
        self.withheld.append(table.residual_norm())
        table.forget()
        logger.info("stage %d ends: a residual of norm %.3g is dropped", self.stage, self.withheld[-1])

    def apply_rate(self) -> None:
        """Sets the optimizer's ``lr`` to the stage's rate. Call it after another scheduler changed it."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate

    def state_dict(self) -> dict[str, Any]:
        """Returns stage, step, anchor w~_s, the running sum of iterates and what was dropped so far."""
        return {
            "stage": self.stage,
            "stage_step": self.stage_step,
            "withheld": list(self.withheld),
            "anchor": [a.clone() for a in self.anchor],
            "sum": self._sum.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues a saved run. Load model, optimizer and hook state as well."""
        self.stage, self.stage_step = state["stage"], state["stage_step"]
        self.withheld = list(state["withheld"])
        for own, saved in zip(self.anchor, state["anchor"], strict=True):
            own.copy_(saved)
        self._sum.copy_(state["sum"])
        self._fresh = False
        self.apply_rate()
