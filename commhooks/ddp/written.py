"""What the hook wrote into a parameter's ``.grad``, and whether it is still there.

torch counts the changes of a tensor in place (``_version``). The count tells whether anything but the hook
and DDP has written to a gradient since, without a look at its values.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..gradient.held import HeldAverage


@dataclass(eq=False, slots=True)
class Written:
    """A bucket that the hook overwrites with its average.

    Attributes:
        start, end: addresses of the buffer.
        version: the buffer's version after the reduction. -1: it holds no average (yet).
        views: the parameters whose ``.grad`` is a view of the buffer, and so counts versions with it.
        intact: whether the views held the average when the next backward pass began; None: not known yet.
    """

    start: int
    end: int
    version: int = -1
    views: list[weakref.ref[Any]] = field(default_factory=list)
    intact: bool | None = None

    @classmethod
    def of(cls, buffer: Tensor) -> Written:
        """Returns the record of a bucket with this buffer."""
        start = buffer.data_ptr() if buffer.layout == torch.strided else 0
        return cls(start, start + buffer.numel() * buffer.element_size())

    def holds(self, address: int) -> bool:
        """Whether an address lies in the buffer."""
        return self.start <= address < self.end

    def begin(self) -> bool:
        """Records, at the first call, whether the views hold the average, and returns it.

        Call it before a backward pass adds to any of them: that changes the version of all.
        """
        if self.intact is None:
            grads = [parameter.grad for view in self.views if (parameter := view()) is not None]
            views = [
                g for g in grads if g is not None and g.layout == torch.strided and self.holds(g.data_ptr())
            ]
            self.intact = all(grad._version == self.version for grad in views[:1])
        return self.intact


@dataclass(eq=False, slots=True)
class Record:
    """What is known of one parameter.

    Attributes:
        parameter: the parameter, weakly: an id may be given to another object later.
        name: for messages.
        reached: whether a backward pass reached the parameter since its bucket was last taken.
        ever_reached: whether one ever did.
        written: the average that the hook wrote, until a backward pass reaches the parameter.
        passes: how often the hook has written one.
        counts: whether a bucket of the present optimizer step has had its gradient.
        version: the parameter's own version then. A step of any optimizer changes it.
        excused: whether the average may be zeroed without a warning.
        was_stepped: whether an optimizer that holds the parameter has ever stepped.
        held: the average to which a backward pass has added its gradient.
        address, versions: the memory of ``.grad`` when the bucket was taken (None: there was none), and the
            versions that it may have if only the hook and DDP have written to it since.
    """

    parameter: weakref.ref[Any]
    name: str
    reached: bool = False
    ever_reached: bool = False
    written: Written | None = None
    passes: int = 0
    counts: bool = False
    version: int = 0
    excused: bool = True
    was_stepped: bool = False
    held: HeldAverage | None = None
    address: int | None = None
    versions: tuple[int, ...] = ()

    def note(self, written: Written, parameter: Tensor, counts: bool) -> None:
        """Records that the hook is about to write an average into the parameter's ``.grad``.

        Args:
            written: the bucket.
            parameter: the parameter.
            counts: whether the bucket has its gradient.
        """
        grad, was_left = parameter.grad, not self.reached and self.is_untouched(parameter.grad)
        self.written, self.passes, self.held = written, self.passes + 1, None
        self.counts = counts or self.counts
        if counts:
            self.version = parameter._version
        # What was not in this pass may be zeroed: an optimizer of other parameters may have stepped.
        self.excused = not counts
        if grad is None:  # DDP makes ``.grad`` if another rank has a gradient
            self.address, self.versions = None, (0, 1)
        elif grad.layout != torch.strided:
            self.versions = ()
            return
        else:
            # DDP copies the bucket to ``.grad`` once, and not at all where no rank had a gradient.
            now = grad._version
            self.address, self.versions = grad.data_ptr(), (now, now + 1) if was_left else (now + 1,)
        if self.address is None or written.holds(self.address):
            written.views.append(self.parameter)

    def is_untouched(self, grad: Tensor | None) -> bool:
        """Whether ``grad`` still is what the hook and DDP wrote."""
        if grad is None or grad.layout != torch.strided or not self.versions:
            return False
        if self.written is None or self.written.version < 0:
            return False
        address = grad.data_ptr()
        if self.address not in (None, address):
            # DDP lays its buckets anew after the first pass, and moves gradients that are views of them.
            return self.passes == 1 and self.written.holds(self.address or 0) and grad._is_view()
        return self.written.begin() if self.written.holds(address) else grad._version in self.versions

    def is_of_this_step(self, parameter: Tensor) -> bool:
        """Whether an earlier bucket of the present optimizer step had the parameter's gradient."""
        return self.counts and parameter._version == self.version

    def stepped(self) -> None:
        """Records that an optimizer has stepped, or that the memory has forgotten the averages."""
        self.counts, self.excused = False, True
