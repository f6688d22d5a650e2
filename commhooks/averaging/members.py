"""Numbers a model's tensors, and decides which of them take part in an averaging."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .flat import checksum


class Members:
    """The tensors an averager was given, numbered in the order in which it saw them first.

    A tensor takes part in an averaging when one of these holds:

    - it requires a gradient,
    - it required a gradient at the averaging before, or when it was first seen: a layer that was frozen in
      between is averaged once more,
    - it has moved since, though it requires no gradient: the teacher of a moving average, for instance. A
      checksum of its bits tells.

    Messages hold the tensors in the order of their numbers. A reducer's memory uses the numbers as keys.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        """All tensors seen, by number."""
        self._numbers: dict[int, int] = {}  # of id(tensor); the list keeps every id alive
        self._trained: list[bool] = []  # whether it required a gradient at the last averaging
        self._left: list[int | None] = []  # checksums as the last averaging left them
        self._loaded: list[bool] = []  # of a saved state, for tensors not seen yet

    def see(self, given: Sequence[Tensor]) -> list[int]:
        """Returns the numbers of the tensors, ascending. Tensors not seen before get new numbers.

        Tensors that replace known ones, shape by shape (``load_state_dict(..., assign=True)``), take over
        their numbers.
        """
        unknown = [t for t in given if id(t) not in self._numbers]
        if unknown:
            known = {self._numbers[id(t)] for t in given if id(t) in self._numbers}
            missing = [n for n in range(len(self.tensors)) if n not in known]
            if missing and [t.shape for t in unknown] == [self.tensors[n].shape for n in missing]:
                for number, tensor in zip(missing, unknown, strict=True):
                    self._replace(number, tensor)
            else:
                for tensor in unknown:
                    self._add(tensor)
        return sorted(self._numbers[id(t)] for t in given)

    def _add(self, tensor: Tensor) -> None:
        number = len(self.tensors)
        self._numbers[id(tensor)] = number
        self.tensors.append(tensor)
        trained = self._loaded[number] if number < len(self._loaded) else tensor.requires_grad
        self._trained.append(trained)
        self._left.append(_checksum_if_frozen(tensor))

    def _replace(self, number: int, tensor: Tensor) -> None:
        del self._numbers[id(self.tensors[number])]
        self._numbers[id(tensor)] = number
        self.tensors[number] = tensor

    def taking_part(self, numbers: Sequence[int]) -> list[int]:
        """Returns those of the numbers whose tensors take part now, by the rule of this class."""
        return [n for n in numbers if self._trained[n] or self.tensors[n].requires_grad or self._moved(n)]

    def _moved(self, number: int) -> bool:
        now, before = _checksum_if_frozen(self.tensors[number]), self._left[number]
        return now is not None and before is not None and now != before

    def averaged(self, numbers: Sequence[int]) -> None:
        """Notes that these tensors were averaged just now."""
        for number in numbers:
            tensor = self.tensors[number]
            self._trained[number] = tensor.requires_grad
            self._left[number] = _checksum_if_frozen(tensor)

    def trained(self, numbers: Sequence[int]) -> list[int]:
        """Returns those of the numbers that required a gradient when last averaged or first seen."""
        return [n for n in numbers if self._trained[n]]

    def state_dict(self) -> dict[str, Any]:
        """Returns which tensors required a gradient at the last averaging."""
        return {"trained": list(self._trained)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a saved state, for the tensors seen so far and for those seen later."""
        self._loaded = list(state["trained"])
        self._trained[: len(self._loaded)] = self._loaded[: len(self._trained)]

    def __deepcopy__(self, memo: dict[int, Any]) -> Members:
        other = Members()
        other.tensors = copy.deepcopy(self.tensors, memo)
        other._numbers = {id(tensor): number for number, tensor in enumerate(other.tensors)}
        other._trained, other._loaded = list(self._trained), list(self._loaded)
        other._left = list(self._left)
        return other


def _checksum_if_frozen(tensor: Tensor) -> int | None:
    """Returns a checksum of the bits of a tensor without gradient, or None for others and for integers."""
    if tensor.requires_grad or not (tensor.is_floating_point() or tensor.is_complex()):
        return None
    return checksum([tensor])
