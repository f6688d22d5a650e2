"""``Recipe``: what goes with an optimizer, and the settings that move from it into the memory."""

from __future__ import annotations

import logging
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..memory import ErrorFeedback
from ..schemes import SCHEMES
from ..selection.density import ConstantDensity, DensitySchedule, ExponentialWarmup
from ..transports.announce import is_first_rank, tell
from .optimizers import has_second_moment

logger = logging.getLogger(__name__)

MOVED = ("momentum", "nesterov", "weight_decay")
"""The options of ``torch.optim.SGD`` that become ``ErrorFeedback``'s."""

_guards: weakref.WeakKeyDictionary[ErrorFeedback, _SettingsGuard] = weakref.WeakKeyDictionary()
_hooks: list[Any] = []  # one hook serves all guards


class Recipe:
    """Density, memory and scheme for an optimizer. Nothing is changed before :meth:`apply`.

    - ``torch.optim.SGD``: momentum, Nesterov's form and weight decay go into the memory. Without a warm-up
      its velocity is masked where a value was sent (Deep Gradient Compression). Behind a warm-up, which sends
      many values, masking would take most of the momentum away: see docs/recipes.md.
    - Adam and others that divide by past magnitudes stay as they are. Every element of their gradients is
      sent in 4 bits, unless a sparse scheme is asked for.
    - Other optimizers, such as Muon, stay as they are, too, and send the same.

    Args:
        optimizer: the job's optimizer.
        density: final k/n in (0, 1].
        warmup_steps: steps over which the density falls from 0.25. 0: none. May be None with ``"lowbit"``,
            which has no density.
        scheme: a name of ``SCHEMES`` except ``"dense"``. None: ``"topk"`` for ``torch.optim.SGD``, and
            ``"lowbit"`` for all others, for which sparse gradients were not seen to train.
        clip: ``clip_norm`` and ``norm_over`` of ``ErrorFeedback``; or None.
        factor_masking: as ``ErrorFeedback``'s, where the optimizer has momentum. None: without a warm-up.
        rescale_with_lr: whether the residual is in units of the parameters (``ErrorFeedback``'s, of this
            optimizer).

    Attributes:
        density: a constant or the warm-up.
        memory: for one state or compression.
        scheme: the name.

    Raises:
        TypeError: ``optimizer`` has no ``param_groups``, or ``warmup_steps`` is missing.
        ValueError: a number out of range, an unknown or dense scheme, or settings that the memory cannot
            have: momentum or ``nesterov`` that differ between the groups, dampening, ``maximize`` with weight
            decay, random-k with momentum.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        density: float,
        *,
        warmup_steps: int | None,
        scheme: str | None,
        clip: tuple[float, str] | None,
        factor_masking: bool | None = None,
        rescale_with_lr: bool = False,
    ) -> None:
        if not hasattr(optimizer, "param_groups"):
            raise TypeError(f"optimizer must be a torch optimizer, got {type(optimizer).__name__}")
        if scheme is None:
            scheme = "topk" if isinstance(optimizer, torch.optim.SGD) else "lowbit"
        names = [name for name in SCHEMES if name != "dense"]
        if scheme not in names:
            raise ValueError(f"scheme must be one of {', '.join(names)}, got {scheme!r}")
        if warmup_steps is None and scheme != "lowbit":
            raise TypeError(
                f"for_optimizer() needs warmup_steps with scheme {scheme!r}: steps over which the density "
                "falls from 0.25, such as a quarter of the run's, or 0 for none"
            )
        warmup_steps = 0 if warmup_steps is None else warmup_steps
        if isinstance(warmup_steps, bool) or not isinstance(warmup_steps, int) or warmup_steps < 0:
            raise ValueError(f"warmup_steps must be an integer >= 0, got {warmup_steps!r}")
        self.scheme: str = scheme
        self._optimizer = optimizer
        self.density: DensitySchedule = ConstantDensity(density)
        if warmup_steps > 0 and density < 0.25:
            self.density = ExponentialWarmup(density, warmup_steps)
        settings: dict[str, Any] = {}
        if isinstance(optimizer, torch.optim.SGD):
            settings = _settings_of(optimizer.param_groups)
            if scheme == "randomk" and settings["momentum"] > 0.0:
                raise ValueError(
                    f"scheme='randomk' diverges with momentum, here {settings['momentum']:g}: use 'topk' or "
                    "'gtopk', or set the optimizer's momentum to 0"
                )
            masks = isinstance(self.density, ConstantDensity) if factor_masking is None else factor_masking
            settings["factor_masking"] = masks and settings["momentum"] > 0.0
        if clip is not None:
            settings["clip_norm"], settings["norm_over"] = clip
        if rescale_with_lr:
            settings["rescale_with_lr"] = optimizer
        self.memory = ErrorFeedback(**settings)

    def apply(self) -> dict[str, object]:
        """Sets the optimizer's moved settings to 0, watches that they stay so, and tells rank 0 in one line.

        Returns:
            The settings by name, as they are in the memory now.
        """
        optimizer, line = self._optimizer, self._line()
        if isinstance(optimizer, torch.optim.SGD):
            for group in optimizer.param_groups:
                group.update(momentum=0.0, nesterov=False, weight_decay=0.0)
            _guards[self.memory] = _SettingsGuard(optimizer, self.memory)
        if is_first_rank():
            tell(logger, line)
        settings = self.memory.settings()
        return {name: settings[name] for name in MOVED}

    def _line(self) -> str:
        optimizer, name, memory = self._optimizer, type(self._optimizer).__name__, self.memory
        if isinstance(optimizer, torch.optim.SGD):
            settings = {k: v for k, v in memory.settings().items() if k in MOVED and v not in (0.0, False)}
            shown = ", ".join(f"{k}={v}" for k, v in settings.items())
            does = f"{shown} moved from {name} into the memory" if shown else f"nothing of {name} to move"
            if any("momentum_buffer" in state for state in optimizer.state.values()):
                does += " (what its momentum buffers hold is not taken along)"
            if memory.momentum > 0.0:
                does += f"; factor masking {'on' if memory.factor_masking else 'off'}"
        elif has_second_moment(optimizer):
            does = (
                f"{name} divides by past magnitudes, and sums that arrive late have others, so no momentum "
                "is in the memory. Averaging, which sends its updates every few steps, sends less: "
                "commhooks.averaging.DiLoCo, docs/averaging.md"
            )
            if self.scheme != "lowbit":
                does += (
                    f". {name} loses less of every element in 4 bits (docs/recipes.md): "
                    "SparseState.for_optimizer without scheme=, which commhooks.horovod.DistributedOptimizer "
                    "takes too"
                )
        else:
            does = f"{name} stays as it is"
        clip = (
            ""
            if memory.clip_norm is None
            else f"; clip_norm {memory.clip_norm:g} over the {memory.norm_over}"
        )
        sent = f"density {self.density!r}"
        if self.scheme == "lowbit":
            sent = "every element in 4 bits: no density and no warm-up"
        rate = "; the residual in units of the parameters" if memory.rescales else ""
        return f"commhooks: {does}; {self.scheme}, {sent}{clip}{rate}"


class _SettingsGuard:
    """Refuses steps of an optimizer whose settings were moved and are set again.

    Other optimizer objects that hold its parameters are watched too: Horovod makes one of its own. It lives
    as long as the memory.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, memory: ErrorFeedback) -> None:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        self._held: dict[int, weakref.ref[Tensor]] = {id(p): weakref.ref(p) for p in held}
        settings = memory.settings()
        self._moved = {name: settings[name] for name in MOVED}
        if not _hooks:
            _hooks.append(register_optimizer_step_pre_hook(_before_step))

    def look(self, optimizer: torch.optim.Optimizer) -> None:
        """Raises ``ValueError`` when the optimizer holds a watched parameter and one of the settings."""
        for number, group in enumerate(optimizer.param_groups):
            again = [name for name in MOVED if group.get(name)]
            # One parameter of each group tells whose optimizer it is. This runs at every step.
            if again and any(self._holds(p) for g in optimizer.param_groups for p in g["params"][:1]):
                name = again[0]
                raise ValueError(
                    f"{type(optimizer).__name__} has {name}={group[name]!r} again in parameter group "
                    f"{number}, and for_optimizer moved it into the memory ({name}={self._moved[name]!r} "
                    "there): both would act. OneCycleLR and CyclicLR need cycle_momentum=False. After "
                    f"loading the checkpoint of a run without the memory, or adding a group, set "
                    f"group[{name!r}] to 0"
                )

    def _holds(self, parameter: Tensor) -> bool:
        reference = self._held.get(id(parameter))
        return reference is not None and reference() is parameter


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for guard in list(_guards.values()):
        guard.look(optimizer)


def _settings_of(groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the keyword arguments of ``ErrorFeedback`` for the groups of an SGD.

    Raises:
        ValueError: the memory cannot have these settings.
    """
    momentum, nesterov = (_common(groups, name) for name in ("momentum", "nesterov"))
    if momentum and any(group["dampening"] for group in groups):
        raise ValueError(
            f"dampening {_shown(groups, 'dampening')} has no counterpart in the memory: set it to 0"
        )
    decays = {float(group["weight_decay"]) for group in groups}
    if any(group["maximize"] and group["weight_decay"] for group in groups):
        raise ValueError("maximize=True with weight_decay: in the memory the decay would have the wrong sign")
    decay: Any = decays.pop() if len(decays) == 1 else None
    if decay is None:
        decay = {p: float(group["weight_decay"]) for group in groups for p in group["params"]}
    return {"momentum": float(momentum), "nesterov": bool(nesterov and momentum), "weight_decay": decay}


def _common(groups: list[dict[str, Any]], name: str) -> Any:
    values = {group[name] for group in groups}
    if len(values) > 1:
        raise ValueError(
            f"{name} differs between the parameter groups ({_shown(groups, name)}), and the memory has one "
            "for all: use one value, or leave it to the optimizer with SparseState.topk(...)"
        )
    return values.pop()


def _shown(groups: list[dict[str, Any]], name: str) -> str:
    return ", ".join(str(group[name]) for group in groups)


def check_moved(saved: dict[str, Any], here: dict[str, object] | None) -> None:
    """Checks that a saved state was made for an optimizer with the same settings.

    Args:
        saved: a ``state_dict``. Where nothing was moved it has no ``"moved"``.
        here: what this state's :meth:`Recipe.apply` returned, or None.

    Raises:
        ValueError: a setting differs.
    """
    before = saved.get("moved")
    if here is None or before is None or before == here:
        return
    differing = [name for name in MOVED if before.get(name) != here[name]]
    shown = ", ".join(f"{name} {before.get(name)!r} there and {here[name]!r} here" for name in differing)
    raise ValueError(
        f"the saved memory was made for another optimizer: {shown}. The optimizer's checkpoint says 0 where "
        "a setting was moved: call for_optimizer before the optimizer loads it"
    )
