"""Slots: one flat residual (and velocity) for each bucket, owned by its parameters."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Iterable, Iterator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..gradient.bucket import Bucket

logger = logging.getLogger(__name__)


class BucketMemory:
    """The memory of one bucket layout: flat float32 tensors and where each parameter lies in them."""

    def __init__(self, bucket: Bucket, with_velocity: bool) -> None:
        self.keys, self.numels = bucket.keys, bucket.numels
        self.offsets = [0, *accumulate(bucket.numels)]
        device = bucket.buffer.device
        self.segments = torch.tensor(self.offsets, dtype=torch.int64, device=device)
        self.residual = torch.zeros(bucket.numel, dtype=torch.float32, device=device)
        self.velocity = torch.zeros_like(self.residual) if with_velocity else None

    def residual_views(self) -> Iterator[Tensor]:
        """Views of the residual, one per parameter."""
        return (self.residual[a:b] for a, b in zip(self.offsets, self.offsets[1:], strict=False))

    def view(self, flat: Tensor, position: int) -> Tensor:
        """The part of ``flat`` that belongs to the parameter at ``position``."""
        return flat[self.offsets[position] : self.offsets[position + 1]]

    def active(self, grad: Tensor) -> Tensor | None:
        """Bool ``(n,)``: False where a parameter's whole gradient is zero; None when all take part."""
        idle = [i for i, n in enumerate(self.numels) if n and not bool(self.view(grad, i).any())]
        if not idle:
            return None
        mask = torch.ones(grad.numel(), dtype=torch.bool, device=grad.device)
        for i in idle:
            self.view(mask, i).fill_(False)
        return mask


class ParameterMemory:
    """All slots of a memory, each parameter's place in them, and what was loaded but not yet claimed."""

    def __init__(self, with_velocity: bool, with_residual: bool = True) -> None:
        self.with_velocity, self.with_residual = with_velocity, with_residual
        self.names: dict[Hashable, str] = {}
        self.last_lr: dict[Hashable, float] = {}
        self._slots: dict[int, BucketMemory] = {}
        self._place: dict[Hashable, tuple[BucketMemory, int]] = {}
        self._loaded: dict[str, dict[str, Tensor]] = {"residual": {}, "velocity": {}}
        self._loaded_lr: dict[str, float] = {}

    def slot(self, bucket: Bucket) -> tuple[BucketMemory, bool]:
        """The slot of this bucket; a new one takes over its parameters' memory from wherever it was."""
        slot = self._slots.get(bucket.index)
        if slot is not None and _same_keys(slot.keys, bucket.keys) and self._owns(slot, all):
            return slot, False
        self._check_loaded_names()
        slot = BucketMemory(bucket, self.with_velocity)
        for position, key in enumerate(slot.keys):
            self._claim(slot, position, key)
        self._slots[bucket.index] = slot
        # The new layout may have fewer buckets: a slot whose parameters have all moved on is stale.
        self._slots = {i: s for i, s in self._slots.items() if self._owns(s, any)}
        return slot, True

    def _owns(self, slot: BucketMemory, how: Callable[[Iterable[bool]], bool]) -> bool:
        """Whether ``all`` or ``any`` of the slot's parameters (still) lie in it."""
        return not slot.keys or how(self._place[key][0] is slot for key in slot.keys)

    def known(self, key: Hashable) -> bool:
        """Whether the parameter has a place already."""
        return key in self._place

    def name_of(self, key: Hashable) -> str:
        """The parameter's name for messages."""
        shape = tuple(key.shape) if isinstance(key, Tensor) else key
        return self.names.get(key, f"an unnamed parameter {shape}")

    def _check_loaded_names(self) -> None:
        """What was loaded under a name that no parameter has would wait for ever."""
        known = set(self.names.values())
        lost = [name for name in self._loaded["residual"] if known and name not in known]
        if lost:
            raise ValueError(
                f"the loaded memory has {len(lost)} parameters that this model has not, such as {lost[0]!r} (the "
                f"model's are like {next(iter(self.names.values()))!r}): rename the state's keys, or drop them"
            )

    def _claim(self, slot: BucketMemory, position: int, key: Hashable) -> None:
        name = self.names.get(key, key if isinstance(key, str) else None)
        if name is None and any(self._loaded.values()):
            raise ValueError(
                f"memory was loaded by parameter name and {self.name_of(key)} has none: attach the state with "
                "commhooks.register(ddp_model, state), or call state.set_names(model.named_parameters())"
            )
        old = self._place.get(key)
        for kind, target in (("residual", slot.residual), ("velocity", slot.velocity)):
            if target is None:
                continue
            view = slot.view(target, position)
            loaded = self._loaded[kind].pop(name, None) if name is not None else None
            if loaded is not None:
                if loaded.numel() != view.numel():
                    raise ValueError(
                        f"loaded {kind} of {name} has {loaded.numel()} elements, expected {view.numel()}"
                    )
                _take_over(view, loaded)
            elif old is not None:
                _take_over(view, old[0].view(getattr(old[0], kind), old[1]))
        if name is not None and name in self._loaded_lr:
            self.last_lr[key] = self._loaded_lr.pop(name)
        self._place[key] = (slot, position)

    def residual_norm(self) -> float:
        """L2 norm of all residuals of this rank."""
        views = (slot.view(slot.residual, position) for slot, position in self._place.values())
        squares = [float(view.double().square().sum()) for view in views]
        return math.sqrt(sum(squares))

    def state_dict(self) -> dict[str, Any]:
        """Copies by parameter name: ``{"residual": {name: (n,)}, "velocity": ..., "last_lr": {name:
        float}}``."""
        state: dict[str, Any] = {kind: dict(loaded) for kind, loaded in self._loaded.items()}
        state["last_lr"] = dict(self._loaded_lr)
        for key, (slot, position) in self._place.items():
            name = self.names.get(key, key if isinstance(key, str) else None)
            if name is None:
                raise ValueError(
                    f"state_dict needs the parameters' names ({self.name_of(key)}): attach the state with "
                    "commhooks.register(ddp_model, state), or call state.set_names(model.named_parameters())"
                )
            state["residual"][name] = slot.view(slot.residual, position).clone()
            if slot.velocity is not None:
                state["velocity"][name] = slot.view(slot.velocity, position).clone()
            if key in self.last_lr:
                state["last_lr"][name] = self.last_lr[key]
        return state

    def forget(self) -> None:
        """Starts anew: residuals and velocities become zero, the layout and the parameters' places stay."""
        for slot in self._slots.values():
            slot.residual.zero_()
            if slot.velocity is not None:
                slot.velocity.zero_()
        self.last_lr.clear()
        self._loaded = {"residual": {}, "velocity": {}}
        self._loaded_lr = {}

    def load(self, state: dict[str, Any]) -> None:
        """Replaces everything: each tensor waits until its parameter is seen first."""
        self._slots.clear()
        self._place.clear()
        self.last_lr.clear()
        self._loaded = {
            kind: {n: t.clone() for n, t in state[kind].items()} for kind in ("residual", "velocity")
        }
        if not self.with_residual:
            held = sum(1 for residual in self._loaded["residual"].values() if bool(residual.any()))
            if held:
                logger.warning(
                    "the loaded residuals of %d parameters are dropped: this state has no memory", held
                )
            self._loaded["residual"].clear()
        if self._loaded["velocity"] and not self.with_velocity:
            logger.warning("the loaded velocities are dropped: this memory has no momentum")
            self._loaded["velocity"].clear()
        self._loaded_lr = dict(state.get("last_lr", {}))


def _take_over(view: Tensor, source: Tensor) -> None:
    """Copies ``source`` into ``view`` (n,); ``source`` may be freed right afterwards."""
    view.copy_(source.reshape(-1))
    if source.is_cuda:
        # Loaded state was made on the main stream, an old slot perhaps on the stream of an earlier worker. The allocator
        # must not hand its memory out again there while the copy on this stream is still on its way.
        source.record_stream(torch.cuda.current_stream(source.device))


def _same_keys(a: tuple[Hashable, ...], b: tuple[Hashable, ...]) -> bool:
    """Whether both name the same parameters; by hash, since == on Parameters compares elements."""
    return len(a) == len(b) and all(hash(x) == hash(y) for x, y in zip(a, b, strict=True))
