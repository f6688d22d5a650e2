"""``StepWatch``: observes what a training program does with the gradients that the hook wrote.

For the hook a step ends with the last bucket of a backward pass. For the program it ends with
``optimizer.step()``. In between, the program may discard gradients, accumulate them or leave them. A hook on
every parameter and a hook after every ``torch.optim`` step notice four cases:

- *held*: a backward pass reaches a parameter whose ``.grad`` still is the average that the hook wrote. The
  bucket will hold the sum of that average and the new gradient. The watch copies the average before the
  gradient is added, so that only the new gradient enters the memory. If no optimizer has stepped since, the
  pass belongs to the same step. A ``.grad`` that was changed in between cannot be told from a gradient of
  this rank: the sum is averaged, and the watch warns once.
- *discarded*: the average was zeroed before any optimizer stepped with it. What was sent is in no residual
  and in no model. The watch warns once.
- *clipped*: the averages were made smaller before the optimizer stepped with them. The watch warns once.
- *stale*: no backward pass reached a parameter, and DDP copied its old ``.grad`` into the bucket. That is not
  a gradient of this step and does not enter the memory.
"""

from __future__ import annotations

import math
import warnings
import weakref
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

from torch import Tensor

from ..gradient.bucket import Bucket
from ..gradient.held import HeldAverage
from ..gradient.memory_order import flattened
from .optimizer_steps import listen
from .written import Record, Written

HELD = (
    "the gradient of {name} still holds the average of the last backward pass, changed since: this pass "
    "averages both again. Call zero_grad() first; accumulate inside ddp_model.no_sync(); run a backward pass "
    "whose gradients of this model are not wanted inside state.passthrough()"
)
DISCARDED = (
    "gradients that the hook had averaged were zeroed before an optimizer stepped with them: what this step "
    "sent is lost. If the last backward pass was not to count, call state.discard() (it needs "
    "SparseState(..., undoable=True)); if that is known beforehand, run it inside state.passthrough(). Under "
    "Horovod these are methods of the optimizer. Gradients that are taken elsewhere and used later are lost "
    "to this check: then ignore it"
)

CLIPPED = (
    "the averages that the hook wrote were scaled by {factor:.3g} before the optimizer's step. A clip of the "
    "sparse average (clip_grad_norm_, max_grad_norm, gradient_clip_val) loses what it cuts off: {lost:.0%} "
    "of what this step sent has left the memories and does not reach the model. Switch it off and clip "
    "before the memory: ErrorFeedback(clip_norm=...), or for_optimizer(..., clip_norm=...)"
)
UNSCALED = (
    "the averages that the hook wrote were multiplied by {factor:.3g} before the optimizer's step, which "
    "looks like a GradScaler that the state does not know: what is withheld is in scaled units, and a change "
    "of the scale makes it too large or too small. Pass grad_scaler=scaler when making the state. Then clip "
    "before the memory, by ErrorFeedback(clip_norm=...) or for_optimizer(..., clip_norm=...), if the "
    "gradients are clipped too"
)
_LEAST_CLIP = 2.0**-9
"""A smaller factor is taken for a GradScaler's, whose scale starts at 65536."""
_LOOKED_AT = 2**18
"""So many of a bucket's elements are looked at. All of a large bucket would take longer than its exchange."""
_EACH_STEP, _THEN_EVERY = 20, 50
"""The first steps are all looked at for a clip of the average, and then one in so many."""


@dataclass(eq=False, slots=True)
class Found:
    """What of a bucket is no gradient of its backward pass. Positions count the bucket's parameters.

    Attributes:
        written: the record of the bucket, for :meth:`StepWatch.written`.
        stale: positions that no backward pass reached since the last bucket. Their segments do not count.
        held: by position, the average that the segment contains.
        same_step: positions that an earlier bucket of the present optimizer step had too.
    """

    written: Written
    stale: list[int] = field(default_factory=list)
    held: dict[int, HeldAverage] = field(default_factory=dict)
    same_step: frozenset[int] = frozenset()


class StepWatch:
    """Watches the parameters of one model, what their gradients hold, and what becomes of their averages.

    :meth:`end_step`, :meth:`written` and :meth:`remember_largest` are called on the state's thread, the other
    methods on the program's threads.
    """

    def __init__(self) -> None:
        self._records: dict[int, Record] = {}  # by the parameter's id
        self._optimizer_seen = False  # an optimizer has stepped with one of the parameters
        self._thrown_away = False  # the last step was, so its averages may be zeroed
        self._goes_on = False  # the pass under way adds to averages of the same optimizer step
        self._added = False  # the last pass that ended did so
        self._pass_ended = False  # the last bucket of the last pass is reduced
        self._told: set[str] = set()  # kinds of warnings that were given
        self._steps = 0
        self._largest: tuple[weakref.ref[Tensor], int, float, float] | None = None  # see remember_largest()
        self._factors: list[float] = []  # by which averages were made smaller, a step each
        self.enabled = True
        """False while backward passes are ignored (inside ``passthrough``)."""
        listen(self)

    def take(self, parameters: Sequence[Any], buffer: Tensor, all_count: bool = False) -> Found:
        """Records that a bucket is full, and watches parameters that are new.

        Args:
            parameters: the bucket's, in order.
            buffer: shape ``(n,)``, the bucket's gradient.
            all_count: whether the optimizer steps with parameters, too, that no backward pass reached.
        """
        found, same_step = Found(Written.of(buffer)), []
        self._pass_ended = False
        for position, parameter in enumerate(parameters):
            is_new = self._record(parameter) is None
            record = self.add(parameter)
            if record is None:
                continue
            counts, record.reached = record.reached or is_new, False
            if not self.enabled:
                continue
            held = record.held
            if not counts:
                held = (
                    HeldAverage.of(parameter.grad, parameter) if record.is_untouched(parameter.grad) else None
                )
                if held is not None or record.ever_reached:
                    found.stale.append(position)
            if held is not None:
                found.held[position] = held
                if record.is_of_this_step(parameter):
                    same_step.append(position)
            record.note(found.written, parameter, counts or all_count)
        # Where all averages are zero they were zeroed in a way that torch does not count (grad.data.zero_()).
        if not all(average.is_empty for average in found.held.values()):
            found.same_step = frozenset(same_step)
            self._goes_on = self._goes_on or bool(same_step)
        return found

    def never_reached(self, parameters: Sequence[Any]) -> list[int]:
        """Returns the positions of watched parameters that no backward pass has reached yet."""
        records = [self._record(parameter) for parameter in parameters]
        return [p for p, record in enumerate(records) if record is not None and not record.ever_reached]

    def add(self, parameter: Any, name: str | None = None) -> Record | None:
        """Watches a parameter, if it is trained. ``name`` is for messages."""
        record = self._record(parameter)
        if record is None:
            if not (isinstance(parameter, Tensor) and parameter.requires_grad and parameter.is_leaf):
                return None
            record = Record(weakref.ref(parameter), name or f"a parameter {tuple(parameter.shape)}")
            self._records[id(parameter)] = record
            parameter.register_hook(  # type: ignore[no-untyped-call]
                partial(_reached, weakref.ref(self), record)
            )
        record.name = name or record.name
        return record

    def _record(self, parameter: Any) -> Record | None:
        record = self._records.get(id(parameter))
        return record if record is not None and record.parameter() is parameter else None

    def written(self, found: Found, buffer: Tensor) -> None:
        """Records that a bucket holds its average now."""
        found.written.version = buffer._version

    def end_step(self, thrown_away: bool) -> None:
        """Records the end of a step.

        Averages of a step that was thrown away may be zeroed without a warning, unless they hold what earlier
        passes of the same optimizer step sent: that is lost then.
        """
        self._thrown_away = thrown_away and not self._goes_on
        self._added, self._goes_on, self._pass_ended = self._goes_on, False, True

    def forgive(self) -> None:
        """Lets the last averages be zeroed without a warning, since the memory has forgotten them."""
        for record in self._records.values():
            record.stepped()

    def are_unused(self, parameters: Iterable[Any]) -> bool:
        """Whether the last averages still wait for the step of a torch optimizer that has stepped before.

        Reads gradients, and waits for the device, where no optimizer has stepped with any average.
        """
        records = [record for p in parameters if (record := self._record(p)) is not None]
        waiting = [record for record in records if record.written is not None and record.was_stepped]
        if not self._pass_ended or self._thrown_away or any(record.excused for record in waiting):
            return False
        grads = [p.grad for record in waiting if (p := record.parameter()) is not None and p.grad is not None]
        return any(grad.is_sparse or bool(grad.detach().any()) for grad in grads)

    @property
    def holds_back(self) -> bool:
        """Whether a backward pass has sent nothing since an optimizer stepped with the last averages."""
        exchanged = [record for record in self._records.values() if record.passes > 0]
        return any(record.reached for record in exchanged) and not any(record.counts for record in exchanged)

    @property
    def accumulates(self) -> bool:
        """Whether the pass under way, or the last one, added to averages of the same optimizer step."""
        return self._added if self._pass_ended else self._goes_on

    def reached(self, record: Record, parameter: Tensor) -> None:
        """Records that a gradient is about to be added to the parameter's ``.grad``."""
        record.reached = record.ever_reached = True
        if not self.enabled:
            return
        # This reads the gradient once a step where the program zeroes gradients in place. Where it sets them
        # to None this costs nothing.
        grad, written = parameter.grad, record.written
        if written is None:
            # Inside no_sync() the average may have been copied at an earlier pass, and zeroed since.
            if record.held is not None and not _is_nonzero(grad):
                record.held = None
            return
        written.begin()
        record.held = HeldAverage.of(grad, parameter) if record.is_untouched(grad) else None
        record.written = None
        if record.held is not None:
            return
        if _is_nonzero(grad):
            self._tell("held", HELD.format(name=record.name))
        elif not record.excused and self._optimizer_seen and not self._thrown_away:
            self._tell("discarded", DISCARDED)

    def remember_largest(self, bucket: Bucket, scale: float) -> None:
        """Remembers a large element of an average, by which a clip of the average is noticed later.

        It looks at the bucket's first elements only, and waits for the device, so it does nothing at most
        steps.

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
        place = int(bucket.buffer[:_LOOKED_AT].abs().argmax())
        largest = abs(float(bucket.buffer[place]))
        ends = [*accumulate(bucket.numels)]
        position = bisect_right(ends, place)
        parameter = bucket.keys[position]
        if isinstance(parameter, Tensor) and 0.0 < largest < math.inf:
            offset = place - ends[position] + bucket.numels[position]
            self._largest = weakref.ref(parameter), offset, largest, scale

    def _look_for_clip(self, ids: frozenset[int]) -> None:
        """Warns once when averages are clipped: made smaller before the step, by factors that differ.

        A program that multiplies all averages by one constant does not clip. A factor far below 1 is that of
        a GradScaler that the state was not given, which is another warning.

        Args:
            ids: of the parameters that the optimizer has just stepped with.
        """
        parameter = None if self._largest is None else self._largest[0]()
        if self._largest is None or parameter is None or id(parameter) not in ids:
            return
        _, offset, largest, scale = self._largest
        self._largest = None
        if parameter.grad is None or parameter.grad.is_sparse:
            return
        left = abs(float(flattened(parameter.grad.detach(), parameter)[offset])) / largest
        if not 0.0 < left < math.inf:
            return
        # The program may have unscaled the average or not: the factor closer to 1 is taken.
        factor = min((left, left * scale), key=lambda f: abs(math.log(f)))
        if scale == 1.0 and factor < _LEAST_CLIP:
            self._tell("unscaled", UNSCALED.format(factor=factor))
            return
        # A power of two is the constant of a program, or the small scale of a GradScaler.
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

    def stepped(self, ids: frozenset[int]) -> None:
        """Records a step of an optimizer that holds the parameters of these ids."""
        mine = ids & self._records.keys()
        for key in mine:
            self._records[key].stepped()
            self._records[key].was_stepped = True
        if mine:
            self._optimizer_seen = True
            self._look_for_clip(ids)


def _is_nonzero(grad: Tensor | None) -> bool:
    """Whether there is a gradient, and an element of it is not zero. Waits for the device."""
    return grad is not None and bool(grad.detach().any())


def _reached(watch: weakref.ref[StepWatch], record: Record, grad: Tensor) -> None:
    here, parameter = watch(), record.parameter()
    if here is not None and parameter is not None:
        here.reached(record, parameter)
