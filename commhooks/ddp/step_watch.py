"""``StepWatch``: observes what a training program does with the gradients that the hook wrote.

For the hook a step ends with the last bucket of a backward pass. For the program it ends with
``optimizer.step()``. In between, the program may discard gradients, accumulate them or leave them. A hook on
every parameter and a hook after every ``torch.optim`` step notice four cases:

- *held*: a backward pass reaches a parameter whose ``.grad`` still is the average that the hook wrote. The
  bucket would hold the sum of that average and the new gradient, and the average would enter the memory. The
  watch warns once.
- *discarded*: the average was zeroed before any optimizer stepped with it. What was sent is in no residual
  and in no model. The watch warns once.
- *clipped*: the averages were made smaller before the optimizer stepped with them. The watch warns once.
- *stale*: no backward pass reached a parameter, and DDP copied its old ``.grad`` into the bucket. That is not
  a gradient of this step, so the caller of :meth:`StepWatch.take` sets it to zero.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any

from torch import Tensor

from ..gradient.bucket import Bucket
from .optimizer_steps import listen

HELD = (
    "the gradient of {name} still is the average of the last backward pass: this pass would average it "
    "again. Call zero_grad() first; accumulate inside ddp_model.no_sync(); run a backward pass whose "
    "gradients of this model are not wanted inside state.passthrough()"
)
DISCARDED = (
    "gradients that the hook had averaged were zeroed before an optimizer stepped with them: what this step "
    "sent is lost. If the last backward pass was not to count, call state.discard() (it needs "
    "SparseState(..., undoable=True)); if that is known beforehand, run it inside state.passthrough(). "
    "Gradients that are taken elsewhere and used later are lost to this check: then ignore it"
)

CLIPPED = (
    "the averages that the hook wrote were scaled by {factor:.3g} before the optimizer's step. A clip of the "
    "sparse average (clip_grad_norm_, max_grad_norm, gradient_clip_val) loses what it cuts off: {lost:.0%} "
    "of what this step sent has left the memories and does not reach the model. Switch it off and clip "
    "before the memory: ErrorFeedback(clip_norm=...), or for_optimizer(..., clip_norm=...)"
)
_EACH_STEP, _THEN_EVERY = 20, 50
"""The first steps are all looked at for a clip of the average, and then one in so many."""


class StepWatch:
    """Watches the parameters of one model and warns when their averages are misused.

    :meth:`end_step` is called on the state's thread, the other methods on the program's threads.
    """

    def __init__(self) -> None:
        self._watched: set[int] = set()
        self._reached: set[int] = set()  # since their bucket was last taken
        self._ever_reached: set[int] = set()
        self._written: set[int] = set()  # and not reached by a backward pass since
        self._stepped: set[int] = set()  # since they were written
        self._names: dict[int, str] = {}
        self._optimizer_seen = self._thrown_away = False
        self._told: set[str] = set()
        self._steps = 0
        self._largest: tuple[weakref.ref[Tensor], float, float] | None = None
        self._factors: list[float] = []
        self.enabled = True
        """False while backward passes are ignored (inside ``passthrough``)."""
        listen(self)

    def take(self, parameters: Sequence[Any]) -> list[int]:
        """Records that a bucket with these parameters is full, and watches parameters that are new.

        Returns:
            The positions of stale parameters: a backward pass reached them once, but none has since the last
            call.
        """
        stale = []
        for position, parameter in enumerate(parameters):
            key = id(parameter)
            counts = key not in self._watched or key in self._reached
            if key not in self._watched:
                self.add(parameter)
            elif not counts and key in self._ever_reached:
                stale.append(position)
            self._reached.discard(key)
            if self.enabled:
                self._written.add(key)
                # What was not in this pass may be zeroed: an optimizer of other parameters may have stepped.
                (self._stepped.discard if counts else self._stepped.add)(key)
        return stale

    def never_reached(self, parameters: Sequence[Any]) -> list[int]:
        """Returns the positions of watched parameters that no backward pass has reached yet."""
        idle = self._watched - self._ever_reached
        return [position for position, parameter in enumerate(parameters) if id(parameter) in idle]

    def add(self, parameter: Tensor, name: str | None = None) -> None:
        """Watches one more parameter. ``name`` is for messages."""
        key = id(parameter)
        if name is not None:
            self._names[key] = name
        is_trained = isinstance(parameter, Tensor) and parameter.requires_grad and parameter.is_leaf
        if is_trained and key not in self._watched:
            self._watched.add(key)
            parameter.register_hook(  # type: ignore[no-untyped-call]
                partial(_reached, weakref.ref(self), key, weakref.ref(parameter))
            )

    def end_step(self, thrown_away: bool) -> None:
        """Records the end of a step. A step that was thrown away may be zeroed without a warning."""
        self._thrown_away = thrown_away

    def forgive(self) -> None:
        """Lets the last averages be zeroed without a warning, since the memory has forgotten them."""
        self._stepped |= self._written

    def reached(self, key: int, parameter: Tensor) -> None:
        """Records that a gradient is about to be added to the parameter's ``.grad``.

        Warns once if ``.grad`` still is the average of the last backward pass.
        """
        self._reached.add(key)
        self._ever_reached.add(key)
        if key not in self._written or not self.enabled:
            return
        # This reads the gradient once a step where the program zeroes gradients in place. Where it sets them
        # to None this costs nothing.
        if parameter.grad is not None and bool(parameter.grad.detach().any()):
            name = self._names.get(key, f"a parameter {tuple(parameter.shape)}")
            self._tell("held", HELD.format(name=name))
            self._written.remove(key)
            return
        self._written.remove(key)
        if key not in self._stepped and self._optimizer_seen and not self._thrown_away:
            self._tell("discarded", DISCARDED)

    def remember_largest(self, bucket: Bucket, scale: float) -> None:
        """Remembers the largest magnitude of an average, by which a clip of the average is noticed later.

        It reads the bucket and waits for the device, so it does nothing at most steps.

        Args:
            bucket: the average.
            scale: the loss scale that is in it.
        """
        self._steps += 1
        self._largest = None
        if (
            "clipped" in self._told
            or (self._steps > _EACH_STEP and self._steps % _THEN_EVERY)
            or not bucket.numel
        ):
            return
        place = int(bucket.buffer.abs().argmax())
        largest = abs(float(bucket.buffer[place]))
        ends = accumulate(bucket.numels)
        parameter = next(key for key, end in zip(bucket.keys, ends, strict=True) if place < end)
        if isinstance(parameter, Tensor) and 0.0 < largest < math.inf:
            self._largest = weakref.ref(parameter), largest, scale

    def _look_for_clip(self, held: frozenset[int]) -> None:
        """Warns once when averages are made smaller before they are used, by another factor each time."""
        parameter = None if self._largest is None else self._largest[0]()
        if self._largest is None or parameter is None or id(parameter) not in held:
            return
        _, largest, scale = self._largest
        self._largest = None
        if parameter.grad is None or parameter.grad.is_sparse:
            return
        left = float(parameter.grad.detach().abs().max()) / largest
        if not 0.0 < left < math.inf:
            return
        # A GradScaler divides by its scale, a power of two. What is left beside that is a clip's.
        factor = min((left, left * scale), key=lambda f: abs(math.log(f)))
        if scale == 1.0 and abs(2 * math.frexp(factor)[0] % 1) < 1e-3:
            return
        if factor < 1.0 - 1e-3:
            self._factors.append(factor)
            if max(self._factors) > min(self._factors) * 1.001:
                self._tell("clipped", CLIPPED.format(factor=factor, lost=1.0 - factor))

    def _tell(self, what: str, text: str) -> None:
        """Warns once of each kind."""
        if what not in self._told:
            self._told.add(what)
            warnings.warn(text, stacklevel=2)

    def stepped(self, held: frozenset[int]) -> None:
        """Records a step of an optimizer that holds the parameters of these ids."""
        mine = held & self._watched
        if mine:
            self._optimizer_seen = True
            self._stepped |= mine
            self._look_for_clip(held)


def _reached(watch: weakref.ref[StepWatch], key: int, parameter: weakref.ref[Tensor], grad: Tensor) -> None:
    here, tensor = watch(), parameter()
    if here is not None and tensor is not None:
        here.reached(key, tensor)
