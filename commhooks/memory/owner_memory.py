"""``OwnerMemory``: what the second rounding of a low-bit exchange kept, of the chunks that this rank owns."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from .element_order import ElementOrder
    from .parameter_memory import BucketMemory

Piece = tuple[int, Tensor]
"""Where the piece begins within its parameter, by index, and its elements ``(m,)``, float32."""


class OwnedChunk:
    """What this rank keeps of the chunk of one bucket that it owns, as a mean over the ranks.

    Attributes:
        held: the bucket's other memory.
        start, stop: the chunk within the bucket.
        values: shape ``(stop - start,)``, float32. Replaced, never changed in place.
    """

    def __init__(self, held: BucketMemory, start: int, stop: int) -> None:
        self.held, self.start, self.stop = held, start, stop
        self.values = held.residual.new_zeros(stop - start)
        self._before: Tensor | None = None
        self._step = 0

    def begin(self, step: int, rescale: Tensor | None, undoable: bool) -> None:
        """Begins a step.

        Args:
            step: its number.
            rescale: shape ``(parameters,)``, float32: by what the values are multiplied. None: by 1.
            undoable: whether :meth:`recall` may be asked to return to here.
        """
        self._before, self._step = self.values if undoable else None, step
        if rescale is not None:
            factors = rescale.repeat_interleave(self.held.segments.diff())
            self.values = self.values * factors[self.start : self.stop]

    def keep(self, values: Tensor) -> None:
        """Replaces the values by what the step's exchange kept."""
        self.values = values

    def recall(self, step: int | None = None) -> None:
        """Restores the values from before the last step, where it was begun as undoable.

        Args:
            step: nothing is restored where the last step was another one. None: whichever it was.
        """
        if self._before is not None and step in (None, self._step):
            self.values, self._before = self._before, None

    def pieces(self, before: int | None = None) -> Iterator[tuple[Hashable, Piece]]:
        """The values by parameter. A parameter that is laid out in another order gives one whole piece.

        Args:
            before: the number of a step before which the values are wanted, if it was begun as undoable.
        """
        values = self.values
        if self._before is not None and self._step == before:
            values = self._before
        for position, key in enumerate(self.held.keys):
            begin, end = self.held.offsets[position : position + 2]
            first, last = max(begin, self.start), min(end, self.stop)
            if first >= last:
                continue
            piece = first - begin, values[first - self.start : last - self.start]
            order = self.held.orders[position]
            yield key, piece if order is None else (0, order.by_index(_whole(piece, end - begin)))

    def take(self, position: int, piece: Piece, world_size: int) -> None:
        """Adds a piece of the parameter at ``position``; what is not of this chunk goes to the residual."""
        offset, kept = piece
        kept, numel, order = kept.to(self.values), self.held.numels[position], self.held.orders[position]
        if offset + kept.numel() > numel:
            raise ValueError(
                f"a piece of an owner's memory ends at element {offset + kept.numel()} of a parameter of "
                f"{numel}"
            )
        if order is not None:
            offset, kept = 0, order.as_laid_out(_whole((offset, kept), numel))
        begin = self.held.offsets[position] + offset
        end = begin + kept.numel()
        first, last = min(max(begin, self.start), end), max(min(end, self.stop), begin)
        if first < last:
            self.values[first - self.start : last - self.start] += kept[first - begin : last - begin]
        else:
            first = last = begin
        residual = self.held.residual
        residual[begin:first].add_(kept[: first - begin], alpha=world_size)
        residual[last:end].add_(kept[last - begin :], alpha=world_size)


class OwnerMemory:
    """What this rank keeps as the owner of a chunk of each bucket.

    It is carried over by parameter. Where a new layout, a loaded state or another number of ranks P gives
    elements to another owner, this rank adds P times what it kept of them to its residual. So
    ``mean_p residual_p + owned`` stays the same.

    Args:
        loaded: what :meth:`state_dict` returned. None: nothing.
    """

    def __init__(self, loaded: Mapping[str, Mapping[int, Tensor]] | None = None) -> None:
        self._chunks: dict[int, OwnedChunk] = {}
        # By bucket: the step in which its chunk was given up, the chunk, and the residual from before.
        self._given_up: dict[int, tuple[int, OwnedChunk, Tensor]] = {}
        self._loose: dict[Hashable, list[Piece]] = defaultdict(list)  # until the parameter's bucket comes
        self._loaded = {
            name: [(start, kept.clone()) for start, kept in found.items()]
            for name, found in (loaded or {}).items()
        }

    def of_bucket(
        self,
        index: int,
        held: BucketMemory,
        bounds: tuple[int, int],
        world_size: int,
        names: Mapping[Hashable, str],
        undoable_step: int | None = None,
    ) -> OwnedChunk:
        """Returns this rank's chunk of a bucket.

        Args:
            index: the bucket's.
            held: the bucket's other memory. A new layout has a new one.
            bounds: where the chunk begins and ends in the bucket. An empty one: everything that was kept goes
                to the residual.
            world_size: P.
            names: the parameters' names. A key that is a text is its own name.
            undoable_step: the step that :meth:`discard` may be asked to undo. None: none.
        """
        self._given_up.pop(index, None)
        chunk = self._chunks.get(index)
        if chunk is not None and chunk.held is held and (chunk.start, chunk.stop) == bounds:
            return chunk
        if chunk is not None and chunk.held is held and undoable_step is not None:
            self._given_up[index] = undoable_step, chunk, held.residual.clone()
        keys = set(held.keys)
        for other, old in list(self._chunks.items()):
            if other == index or any(key in keys for key in old.held.keys):
                for key, piece in self._chunks.pop(other).pieces():
                    self._loose[key].append(piece)
        chunk = self._chunks[index] = OwnedChunk(held, *bounds)
        for position, key in enumerate(held.keys):
            name = _name(key, names)
            loaded = [] if name is None else self._loaded.pop(name, [])
            for piece in (*self._loose.pop(key, []), *loaded):
                chunk.take(position, piece, world_size)
        return chunk

    def discard(self, step: int) -> None:
        """Restores every chunk from before the step that was its last. Residuals are restored already."""
        for chunk in self._chunks.values():
            chunk.recall(step)
        for index, (given_up_in, chunk, residual) in self._given_up.items():
            if given_up_in == step:
                chunk.held.residual.copy_(residual)
                self._chunks[index] = chunk
        self._given_up.clear()

    def sort_loaded(self, name: str, order: ElementOrder) -> None:
        """Sorts a parameter's loaded pieces by index. They are in its bucket's order."""
        numel = math.prod(order.shape)
        for place, (start, kept) in enumerate(self._loaded.get(name, [])):
            if start + kept.numel() <= numel:
                self._loaded[name][place] = 0, order.by_index(_whole((start, kept), numel))

    def state_dict(
        self, names: Mapping[Hashable, str], before: int | None = None
    ) -> dict[str, dict[int, Tensor]]:
        """Returns copies of all pieces: by the parameter's name and by where the piece begins in it.

        ``before`` as for ``ParameterMemory.state_dict``.
        """
        pieces = [pair for chunk in self._chunks.values() for pair in chunk.pieces(before)]
        pieces += [(key, piece) for key, found in self._loose.items() for piece in found]
        named = [(_name(key, names), piece) for key, piece in pieces]
        named += [(name, piece) for name, found in self._loaded.items() for piece in found]
        state: dict[str, dict[int, Tensor]] = {}
        for name, (start, kept) in named:
            if name is not None:
                found = state.setdefault(name, {})
                found[start] = found[start] + kept if start in found else kept.clone()
        return state


def gathered(states: list[dict[str, Any]]) -> dict[str, dict[int, Tensor]]:
    """Returns the pieces of several ranks of one run together, in new memory.

    Args:
        states: the ranks' state dicts, each with what :meth:`OwnerMemory.state_dict` returned as ``"owned"``.
    """
    result: dict[str, dict[int, Tensor]] = {}
    for state in states:
        for name, found in state.get("owned", {}).items():
            pieces = result.setdefault(name, {})
            for start, kept in found.items():
                pieces[start] = pieces[start] + kept if start in pieces else kept.clone()
    return result


def without_owners(state: dict[str, Any], world_size: int) -> dict[str, Any]:
    """Returns a state whose residuals hold ``world_size`` times what the rank owned. It owns nothing.

    So ``mean_p residual_p + owned`` stays the same where the exchange that follows has no owners.
    """
    if not state.get("owned"):
        return state
    residual = dict(state["residual"])
    for name, found in state["owned"].items():
        ends = [start + kept.numel() for start, kept in found.items()]
        first = next(iter(found.values()))
        residual[name] = residual[name].clone() if name in residual else first.new_zeros(max(ends))
        for start, kept in found.items():
            residual[name][start : start + kept.numel()].add_(kept, alpha=world_size)
    return {**{key: value for key, value in state.items() if key != "owned"}, "residual": residual}


def _whole(piece: Piece, numel: int) -> Tensor:
    """Returns a whole parameter, shape ``(numel,)``, that is zero outside the piece."""
    start, kept = piece
    whole = kept.new_zeros(numel)
    whole[start : start + kept.numel()] = kept
    return whole


def _name(key: Hashable, names: Mapping[Hashable, str]) -> str | None:
    return names.get(key, key if isinstance(key, str) else None)
