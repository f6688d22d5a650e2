"""Residuals and velocities: flat for each bucket, owned by the bucket's parameters."""

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
    """One bucket's memory.

    Attributes:
        keys, numels: the bucket's parameters and their numbers of elements, in the buffer's order.
        segments: shape ``(parameters + 1,)``, int64: where each parameter begins, and ``n``.
        residual: shape ``(n,)``, float32.
        velocity: the same, or None.
    """

    def __init__(self, bucket: Bucket, with_velocity: bool) -> None:
        self.keys, self.numels = bucket.keys, bucket.numels
        self.offsets = [0, *accumulate(bucket.numels)]
        device = bucket.buffer.device
        self.segments = torch.tensor(self.offsets, dtype=torch.int64, device=device)
        self.residual = torch.zeros(bucket.numel, dtype=torch.float32, device=device)
        self.velocity = torch.zeros_like(self.residual) if with_velocity else None
        self._before: list[Tensor] = []
        self._can_recall = False

    def remember(self) -> None:
        """Copies residual and velocity as they are, for :meth:`recall`."""
        now = [self.residual, *([] if self.velocity is None else [self.velocity])]
        self._before = self._before or [torch.empty_like(flat) for flat in now]
        for copy, flat in zip(self._before, now, strict=True):
            copy.copy_(flat)
        self._can_recall = True

    def recall(self) -> bool:
        """Goes back to what was last remembered, bit for bit, once. Returns whether there was anything."""
        if not self._can_recall:
            return False
        self.residual.copy_(self._before[0])
        if self.velocity is not None:
            self.velocity.copy_(self._before[1])
        self._can_recall = False
        return True

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
    """Every parameter's residual and velocity.

    They lie in the memory of the parameter's bucket. What was loaded waits by name until its parameter is
    first seen.

    Attributes:
        names: of the parameters, for state dicts and messages.
        last_lr: the learning rate whose units a parameter's residual has, where it follows the rate.
        undoable: whether each step's beginning is remembered, for :meth:`discard`. It takes as much memory
            again.
    """

    def __init__(self, with_velocity: bool, with_residual: bool = True) -> None:
        self.with_velocity, self.with_residual = with_velocity, with_residual
        self.names: dict[Hashable, str] = {}
        self.last_lr: dict[Hashable, float] = {}
        self.undoable = False
        self._lr_before: dict[Hashable, float] = {}
        self._of_bucket: dict[int, BucketMemory] = {}
        self._place: dict[Hashable, tuple[BucketMemory, int]] = {}
        self._loaded: dict[str, dict[str, Tensor]] = {"residual": {}, "velocity": {}}
        self._loaded_lr: dict[str, float] = {}

    def for_bucket(self, bucket: Bucket) -> tuple[BucketMemory, bool]:
        """The bucket's memory, and whether its layout is new. A new one takes its parameters' memory over."""
        held = self._of_bucket.get(bucket.index)
        is_new = held is None or not _same_keys(held.keys, bucket.keys) or not self._owns(held, all)
        if held is None or is_new:
            held = self._laid_anew(bucket)
        if self.undoable:
            held.remember()
            self._lr_before.update({key: self.last_lr[key] for key in held.keys if key in self.last_lr})
        return held, is_new

    def _laid_anew(self, bucket: Bucket) -> BucketMemory:
        """New memory of a bucket, into which its parameters' memory has moved."""
        self._check_loaded_names()
        held = BucketMemory(bucket, self.with_velocity)
        for position, key in enumerate(held.keys):
            self._claim(held, position, key)
        self._of_bucket[bucket.index] = held
        # The new layout may have fewer buckets. Memory that no parameter lies in any more is dropped.
        self._of_bucket = {i: s for i, s in self._of_bucket.items() if self._owns(s, any)}
        return held

    def discard(self) -> None:
        """Every bucket goes back to the beginning of the last step, bit for bit."""
        for held in self._of_bucket.values():
            held.recall()
        self.last_lr = {**self._lr_before}

    def _owns(self, held: BucketMemory, how: Callable[[Iterable[bool]], bool]) -> bool:
        """Whether ``all`` or ``any`` of its parameters still lie in ``held``."""
        return not held.keys or how(self._place[key][0] is held for key in held.keys)

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
                f"the loaded memory has {len(lost)} parameters that this model has not, such as {lost[0]!r} "
                f"(the model's are like {next(iter(self.names.values()))!r}): rename the state's keys, "
                "or drop them"
            )

    def _claim(self, held: BucketMemory, position: int, key: Hashable) -> None:
        name = self.names.get(key, key if isinstance(key, str) else None)
        if name is None and any(self._loaded.values()):
            raise ValueError(
                f"memory was loaded by parameter name and {self.name_of(key)} has none: attach the state "
                "with commhooks.register(ddp_model, state), or call state.set_names(model.named_parameters())"
            )
        old = self._place.get(key)
        for kind, target in (("residual", held.residual), ("velocity", held.velocity)):
            if target is None:
                continue
            view = held.view(target, position)
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
        self._place[key] = (held, position)

    def residual_norm(self) -> float:
        """L2 norm of all residuals of this rank. Waits once for each device."""
        squares: dict[torch.device, list[Tensor]] = {}
        for held in {id(held): held for held, _ in self._place.values()}.values():
            whole = self._owns(held, all)
            views = (
                [held.residual]
                if whole
                else [
                    held.view(held.residual, i)
                    for i, key in enumerate(held.keys)
                    if self._place[key][0] is held
                ]
            )
            norms = [torch.linalg.vector_norm(view, dtype=torch.float64) for view in views]
            squares.setdefault(held.residual.device, []).extend(norms)
        return math.hypot(
            *(float(torch.linalg.vector_norm(torch.stack(norms))) for norms in squares.values())
        )

    def state_dict(self) -> dict[str, Any]:
        """Copies by parameter name: ``{"residual": {name: (n,)}, "velocity": ..., "last_lr": {name:
        float}}``.
        """
        state: dict[str, Any] = {kind: dict(loaded) for kind, loaded in self._loaded.items()}
        state["last_lr"] = dict(self._loaded_lr)
        for key, (held, position) in self._place.items():
            name = self.names.get(key, key if isinstance(key, str) else None)
            if name is None:
                raise ValueError(
                    f"state_dict needs the parameters' names ({self.name_of(key)}): attach the state with "
                    "commhooks.register(ddp_model, state), or call state.set_names(model.named_parameters())"
                )
            state["residual"][name] = held.view(held.residual, position).clone()
            if held.velocity is not None:
                state["velocity"][name] = held.view(held.velocity, position).clone()
            if key in self.last_lr:
                state["last_lr"][name] = self.last_lr[key]
        return state

    def forget(self) -> None:
        """Residuals and velocities become zero. The layout stays."""
        for held in self._of_bucket.values():
            held.residual.zero_()
            if held.velocity is not None:
                held.velocity.zero_()
        self.last_lr.clear()
        self._loaded = {"residual": {}, "velocity": {}}
        self._loaded_lr = {}

    def load(self, state: dict[str, Any]) -> None:
        """Replaces everything: each tensor waits until its parameter is seen first."""
        self._of_bucket.clear()
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
        # ``source`` was made on another stream: loaded tensors on the main one, a bucket's memory on an
        # earlier thread's. The allocator must not hand its memory out on that stream before the copy on this
        # stream is done.
        source.record_stream(torch.cuda.current_stream(source.device))


def _same_keys(a: tuple[Hashable, ...], b: tuple[Hashable, ...]) -> bool:
    """Whether both name the same parameters; by hash, since == on Parameters compares elements."""
    return len(a) == len(b) and all(hash(x) == hash(y) for x, y in zip(a, b, strict=True))
