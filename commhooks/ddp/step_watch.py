"""``StepWatch``: observes what a training program does with the gradients that the hook wrote.

For the hook a step ends with the last bucket of a backward pass. For the program it ends with
``optimizer.step()``. In between, the program may discard gradients, accumulate them or leave them. A hook on
every parameter and a hook after every ``torch.optim`` step notice three cases:

- *held*: a backward pass reaches a parameter whose ``.grad`` still is the average that the hook wrote. The
  bucket would hold the sum of that average and the new gradient, and the average would enter the memory. The
  watch warns once.
- *discarded*: the average was zeroed before any optimizer stepped with it. What was sent is in no residual
  and in no model. The watch warns once.
- *stale*: no backward pass reached a parameter, and DDP copied its old ``.grad`` into the bucket. That is not
  a gradient of this step, so the caller of :meth:`StepWatch.take` sets it to zero.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

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
            if key not in self._watched:
                self.add(parameter)
            elif key in self._reached:
                self._reached.remove(key)
            elif key in self._ever_reached:
                stale.append(position)
            if self.enabled:
                self._written.add(key)
                self._stepped.discard(key)
        return stale

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


def _reached(watch: weakref.ref[StepWatch], key: int, parameter: weakref.ref[Tensor], grad: Tensor) -> None:
    here, tensor = watch(), parameter()
    if here is not None and tensor is not None:
        here.reached(key, tensor)
