"""Notices averages of the compressions that no optimizer has stepped with at the next backward pass."""

from __future__ import annotations

import warnings

from ..ddp.optimizer_steps import listen
from ..errors import callers_level
from .parameters import Entry, ParameterTable

UNUSED = (
    "{name}: a backward pass came before an optimizer had stepped with the last average. If that was zeroed, "
    "what it had sent is lost. If not, it is averaged again. Run a pass that is not to count with frozen "
    "parameters (requires_grad_(False)), accumulate by backward_passes_per_step, or take "
    "commhooks.horovod.DistributedOptimizer, which has passthrough() and discard(). Gradients that are taken "
    "elsewhere and used later are lost to this check: then ignore it"
)


class UnusedAverages:
    """Remembers which averages wait for an optimizer's step. It warns once.

    Parameters with which no torch optimizer has ever stepped are left out.

    Args:
        table: the parameters.
    """

    def __init__(self, table: ParameterTable) -> None:
        self._entries = table.entries
        self._waiting: set[Entry] = set()
        self._ever_stepped: set[Entry] = set()
        self._told = False
        listen(self)

    def written(self, entry: Entry) -> None:
        """Records that the parameter's gradient becomes an average."""
        self._waiting.add(entry)

    def forgive(self) -> None:
        """Lets the last averages be zeroed: the memory has taken back what they sent."""
        self._waiting.clear()

    def stepped(self, ids: frozenset[int]) -> None:
        """Records a step of an optimizer that holds the parameters of these ids."""
        mine = {entry for entry in self._entries if id(entry.parameter) in ids}
        self._waiting -= mine
        self._ever_stepped |= mine

    def reached(self, entry: Entry) -> None:
        """Records the parameter's next gradient, and warns if its last average was not used."""
        if entry in self._waiting and entry in self._ever_stepped and not self._told:
            self._told = True
            warnings.warn(UNUSED.format(name=entry.name), stacklevel=callers_level())
        self._waiting.discard(entry)
