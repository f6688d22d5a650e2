"""Residuals and velocities: stored flat per bucket, carried over by parameter when the layout changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..gradient.bucket import Bucket
from ..native.fused import Fused
from .element_order import ElementOrder, order_of, orders_in
from .owner_memory import OwnerMemory

VERSION = 2
"""Of the format of checkpoints. Version 1 has each parameter's elements as DDP lays them out."""


class BucketMemory:
    """Residual and velocity of one bucket of ``n`` elements, on the bucket's device. They start at zero.

    Attributes:
        keys, numels: the bucket's parameters and their numbers of elements, in the buffer's order.
        offsets: where each parameter begins in the buffer, and ``n`` at the end.
        segments: the offsets as a tensor, shape ``(parameters + 1,)``, int64.
        orders: each parameter's order of elements. None: that of its indices.
        residual: shape ``(n,)``, float32.
        velocity: shape ``(n,)``, float32, or None.
        entered: shape ``(parameters,)``, bool: whose gradients have entered in the present optimizer step.
        again: in the present pass, positions of those that entered in an earlier pass of the same step.
    """

    def __init__(self, bucket: Bucket, with_velocity: bool) -> None:
        self.keys, self.numels = bucket.keys, bucket.numels
        self.offsets = [0, *accumulate(bucket.numels)]
        self.orders = orders_in(bucket)
        device = bucket.buffer.device
        self.segments = torch.tensor(self.offsets, dtype=torch.int64, device=device)
        self.residual = torch.zeros(bucket.numel, dtype=torch.float32, device=device)
        self.velocity = torch.zeros_like(self.residual) if with_velocity else None
        self.entered = torch.zeros(len(self.keys), dtype=torch.bool, device=device)
        self.again: list[int] = []
        # The memory from before the last pass; once that was recalled, the memory from after it.
        self._other: tuple[Tensor, Tensor | None] | None = None
        self._can_recall = False
        self._pass_of = 0  # the step of the last pass that was written apart

    def begin(self, same_step: frozenset[int]) -> None:
        """Begins a pass. Waits for the device unless ``same_step``, as in :class:`Bucket`, is empty."""
        entered = self.entered.tolist() if same_step else []
        self.again = [position for position in sorted(same_step) if entered[position]]

    def end(self, active: Tensor | None) -> None:
        """Records which parameters took part in the pass: bool ``(parameters,)``; None when all did.

        A pass that is undone has no such parameters.
        """
        self.entered = torch.ones_like(self.entered) if active is None else active
        if self.again:
            self.entered = self.entered | self.flags(self.again)

    def flags(self, positions: Sequence[int]) -> Tensor:
        """Returns bool ``(parameters,)``, True at ``positions``."""
        flags = torch.zeros(len(self.keys), dtype=torch.bool, device="cpu")
        flags[list(positions)] = True
        return flags.to(self.residual.device)

    def apart(self, operands: Fused, step: int) -> Fused:
        """Makes the pass write into a second memory, which takes the first one's place.

        ``residual`` and ``velocity`` are the second one's tensors from here on. :meth:`recall` swaps back.

        Args:
            operands: of a pass that works in place on ``residual`` and ``velocity``.
            step: the number of the step that the pass belongs to.

        Returns:
            The operands with the second memory as their outputs.
        """
        now = self.residual, self.velocity
        if self._other is None:
            self._other = torch.empty_like(now[0]), None if now[1] is None else torch.empty_like(now[1])
        (self.residual, self.velocity), self._other = self._other, now
        self._can_recall, self._pass_of = True, step
        return replace(operands, residual_out=self.residual, velocity_out=self.velocity)

    def recall(self) -> bool:
        """Restores the memory from before the last pass, bit for bit. A pass can be undone once.

        Returns:
            Whether it could be: the pass wrote :meth:`apart`.
        """
        if self._other is None or not self._can_recall:
            return False
        (self.residual, self.velocity), self._other = self._other, (self.residual, self.velocity)
        self._can_recall = False
        return True

    def changed_in(self, step: int | None) -> bool:
        """Whether the last pass was one of this step, so that :meth:`recall` would return to its start."""
        return self._can_recall and self._pass_of == step

    def at_start_of(self, step: int | None) -> tuple[Tensor, Tensor | None]:
        """Returns residual and velocity from before ``step``, if its last pass was written :meth:`apart`.

        Otherwise, and for None, it returns the present ones.
        """
        if self._other is not None and self.changed_in(step):
            return self._other
        return self.residual, self.velocity

    def forget(self) -> None:
        """Sets residual and velocity to zero. Nothing is left to recall."""
        self.residual.zero_()
        if self.velocity is not None:
            self.velocity.zero_()
        self._can_recall = False

    def view(self, flat: Tensor, position: int) -> Tensor:
        """Returns the view of ``flat`` (n,) that belongs to the parameter at ``position``."""
        return flat[self.offsets[position] : self.offsets[position + 1]]

    def by_index(self, flat: Tensor, position: int) -> Tensor:
        """Returns a copy of a parameter's part of ``flat`` (n,), in the order of its indices."""
        order, view = self.orders[position], self.view(flat, position)
        return view.clone() if order is None else order.by_index(view)

    def mask(self, active: Tensor | None) -> Tensor | None:
        """Spreads flags of the parameters over their elements.

        Args:
            active: bool ``(parameters,)``, as ``Selected.active``; None when all parameters took part.

        Returns:
            Bool ``(n,)``; None when all elements took part.
        """
        return None if active is None else active.repeat_interleave(self.segments.diff())


class ParameterMemory:
    """Table of every parameter's residual and velocity.

    The tensors lie in the :class:`BucketMemory` of the parameter's bucket. Loaded tensors are kept by name
    until their parameter is first seen.

    Args:
        with_velocity: whether velocities are kept.
        with_residual: False for a memory that keeps nothing: loaded residuals are then dropped.

    Attributes:
        names: the parameters' names, for state dicts and messages.
        last_lr: per parameter, the learning rate that its residual was last scaled for (``rescale_with_lr``).
        owned: what this rank keeps as an owner in low-bit exchanges.
    """

    def __init__(self, with_velocity: bool, with_residual: bool = True) -> None:
        self.with_velocity, self.with_residual = with_velocity, with_residual
        self.names: dict[Hashable, str] = {}
        self.last_lr: dict[Hashable, float] = {}
        self.owned = OwnerMemory()
        self._lr_before: dict[Hashable, float | None] = {}
        self._of_bucket: dict[int, BucketMemory] = {}
        self._place: dict[Hashable, tuple[BucketMemory, int]] = {}
        self._loaded: dict[str, dict[str, Tensor]] = {"residual": {}, "velocity": {}}
        self._loaded_lr: dict[str, float] = {}
        self._is_version_1 = False  # whether _loaded has the order of that format

    def for_bucket(self, bucket: Bucket) -> tuple[BucketMemory, bool]:
        """Returns the bucket's memory, and whether its layout is new.

        At a new layout the parameters' residuals and velocities are copied into a new :class:`BucketMemory`.
        """
        held = self._of_bucket.get(bucket.index)
        is_new = held is None or not same_keys(held.keys, bucket.keys) or not self._owns(held, all)
        if held is None or is_new:
            held = self._laid_anew(bucket)
        return held, is_new

    def keep_rates(self, held: BucketMemory) -> None:
        """Keeps a bucket's learning rates of the step before, for :meth:`discard`."""
        self._lr_before.update((key, self.last_lr.get(key)) for key in held.keys)

    def _laid_anew(self, bucket: Bucket) -> BucketMemory:
        """Makes the bucket's memory anew and copies its parameters' residuals and velocities into it."""
        self._check_loaded_names()
        self._sort_version_1()
        held = BucketMemory(bucket, self.with_velocity)
        for position, key in enumerate(held.keys):
            self._claim(held, position, key)
        self._of_bucket[bucket.index] = held
        # The new layout may have fewer buckets. A BucketMemory that holds no parameter any more is dropped.
        self._of_bucket = {i: s for i, s in self._of_bucket.items() if self._owns(s, any)}
        return held

    def discard(self, step: int) -> None:
        """Restores the memory from before a step, the last one, bit for bit.

        Buckets that were not in it stay as they are. A new layout stays, and so does what an owner's memory
        gave to residuals because of it.
        """
        for held in self._of_bucket.values():
            if held.changed_in(step):
                self.recall(held)
        self.owned.discard(step)

    def recall(self, held: BucketMemory) -> bool:
        """Restores a bucket's memory from before its last pass, and the rates that it was scaled for.

        Returns:
            Whether it could be: the pass was written apart.
        """
        if not held.recall():
            return False
        for key in held.keys:
            rate = self._lr_before.get(key)
            if rate is None:
                self.last_lr.pop(key, None)
            else:
                self.last_lr[key] = rate
        return True

    def _owns(self, held: BucketMemory, how: Callable[[Iterable[bool]], bool]) -> bool:
        """Whether ``all`` or ``any`` of the parameters of ``held`` still have their memory in it."""
        return not held.keys or how(self._place[key][0] is held for key in held.keys)

    def layouts(self) -> dict[int, tuple[Hashable, ...]]:
        """Returns the parameters of each bucket whose layout is known, by the bucket's index."""
        return {i: held.keys for i, held in self._of_bucket.items() if self._owns(held, all)}

    def known(self, key: Hashable) -> bool:
        """Whether the table holds the parameter already."""
        return key in self._place

    def name_of(self, key: Hashable) -> str:
        """Returns the parameter's name for messages, or its shape where it has no name."""
        shape = tuple(key.shape) if isinstance(key, Tensor) else key
        return self.names.get(key, f"an unnamed parameter {shape}")

    def _check_loaded_names(self) -> None:
        """Raises ``ValueError`` when a loaded name belongs to no parameter and would never be used."""
        known = set(self.names.values())
        lost = [name for name in self._loaded["residual"] if known and name not in known]
        if lost:
            raise ValueError(
                f"the loaded memory has {len(lost)} parameters that this model has not, such as {lost[0]!r} "
                f"(the model's are like {next(iter(self.names.values()))!r}): rename the state's keys, or "
                "drop them"
            )

    def _claim(self, held: BucketMemory, position: int, key: Hashable) -> None:
        """Copies the parameter's loaded or former tensors into ``held`` and records its new place."""
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
                _take_over(view, loaded, held.orders[position])
            elif old is not None:
                values = old[0].by_index(getattr(old[0], kind), old[1])
                _take_over(view, values, held.orders[position])
        if name is not None and name in self._loaded_lr:
            self.last_lr[key] = self._loaded_lr.pop(name)
        if old is not None:
            held.entered[position] = old[0].entered[old[1]]
        self._place[key] = (held, position)

    def residual_norm(self) -> float:
        """Returns the L2 norm of all residuals of this rank. The host waits once for each device."""
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

    def state_dict(self, before: int | None = None) -> dict[str, Any]:
        """Returns copies of all tensors by parameter name.

        Args:
            before: the number of the last step, or of the one under way. The tensors are from before it.
                None: as they are now.

        Returns:
            ``{"version": 2, "residual": {name: (n,)}, "velocity": {name: (n,)}, "last_lr": {name: float}}``;
            after low-bit exchanges also ``{"owned": {name: {start: (m,)}}}``, the pieces that this rank owns.
            Elements are in the order of the parameter's indices, whatever its layout in memory. Version 1
            comes back where it was loaded and the parameters are not known yet.

        Raises:
            ValueError: a parameter has no name.
        """
        if self.names:
            self._sort_version_1()
        state: dict[str, Any] = {"version": 1 if self._is_version_1 else VERSION}
        state.update({kind: dict(loaded) for kind, loaded in self._loaded.items()})
        state["last_lr"] = dict(self._loaded_lr)
        for key, (held, position) in self._place.items():
            name = self.names.get(key, key if isinstance(key, str) else None)
            if name is None:
                raise ValueError(
                    f"state_dict needs the parameters' names ({self.name_of(key)}): attach the state with "
                    "commhooks.register(ddp_model, state), or call state.set_names(model.named_parameters())"
                )
            residual, velocity = held.at_start_of(before)
            if self.with_residual:
                state["residual"][name] = held.by_index(residual, position)
            if velocity is not None:
                state["velocity"][name] = held.by_index(velocity, position)
            rates = self._lr_before if held.changed_in(before) else self.last_lr
            if (rate := rates.get(key)) is not None:
                state["last_lr"][name] = rate
        owned = self.owned.state_dict(self.names, before)
        return {**state, "owned": owned} if owned else state

    def forget(self) -> None:
        """Sets residuals and velocities to zero and drops loaded tensors. The layout stays."""
        for held in self._of_bucket.values():
            held.forget()
        self.owned = OwnerMemory()
        self.last_lr.clear()
        self._loaded = {"residual": {}, "velocity": {}}
        self._loaded_lr = {}

    def load(self, state: dict[str, Any]) -> None:
        """Replaces the table by a :meth:`state_dict`. A tensor is used when its parameter is first seen.

        Residuals or velocities that this table does not keep are dropped.
        """
        self._of_bucket.clear()
        self._place.clear()
        self.last_lr.clear()
        self._loaded = {
            kind: {n: t.clone() for n, t in state[kind].items()} for kind in ("residual", "velocity")
        }
        for kind, has in (("residual", self.with_residual), ("velocity", self.with_velocity)):
            if not has:
                self._loaded[kind].clear()
        self.owned = OwnerMemory(state.get("owned") if self.with_residual else None)
        self._loaded_lr = dict(state.get("last_lr", {}))
        self._is_version_1 = state.get("version", 1) < 2

    def _sort_version_1(self) -> None:
        """Sorts what a checkpoint of version 1 holds by index. It is as DDP lays the parameters out."""
        if not self._is_version_1:
            return
        self._is_version_1 = False
        for key, name in self.names.items():
            order = order_of(key)
            if order is None:
                continue
            self.owned.sort_loaded(name, order)
            for loaded in self._loaded.values():
                if name in loaded and loaded[name].numel() == math.prod(order.shape):
                    loaded[name] = order.by_index(loaded[name])


def _take_over(view: Tensor, source: Tensor, order: ElementOrder | None) -> None:
    """Copies ``source``, by index, into ``view`` (n,). The caller may free ``source`` right afterwards."""
    values = source.reshape(-1)
    view.copy_(values if order is None else order.as_laid_out(values))
    if source.is_cuda:
        # ``source`` was made on another stream: loaded tensors on the main stream, a bucket's memory on an
        # earlier thread's stream. The allocator must not reuse its memory on that stream before the copy on
        # this stream is done.
        source.record_stream(torch.cuda.current_stream(source.device))


def same_keys(a: tuple[Hashable, ...], b: tuple[Hashable, ...]) -> bool:
    """Whether both hold the same parameters. Hashes are compared, since == on parameters is elementwise."""
    return len(a) == len(b) and all(hash(x) == hash(y) for x, y in zip(a, b, strict=True))
