"""Finds the parameter that a gradient belongs to, by the identity of ``p.grad``."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

SCALER_ORDER = (
    "optimizer.synchronize(); scaler.unscale_(optimizer); clip, if you do; "
    "with optimizer.skip_synchronize(): scaler.step(optimizer)"
)
"""The calls by which a GradScaler steps with a Horovod optimizer, as in Horovod's own documentation."""


@dataclass(eq=False)
class Entry:
    """One parameter.

    Attributes:
        name: its name, the same on all ranks.
        parameter: the Parameter itself.
        index: its place in the names' alphabetical order, the same on all ranks.
        mask_key: 63 bits of the name's hash. It makes the parameters' random masks of one step differ.
        step: exchanges of this parameter so far.
    """

    name: str
    parameter: Tensor
    index: int
    mask_key: int
    step: int = 0


class ParameterTable:
    """Finds the entry whose parameter's ``grad`` is a given tensor object.

    Horovod calls ``compress(p.grad)`` in the order in which gradients become ready. That order differs
    between ranks, shapes repeat, and addresses are reused, so ``p.grad is tensor`` is the only safe test. The
    search begins behind the entry that was found last.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        pairs = list(check_named(named_parameters))
        places = {name: place for place, name in enumerate(sorted(name for name, _ in pairs))}
        # backward reaches the last parameter first
        self.entries = [Entry(name, p, places[name], mask_key_of(name)) for name, p in reversed(pairs)]
        self._start = 0

    def find(self, tensor: Tensor) -> Entry:
        """Finds the entry of the parameter whose gradient ``tensor`` is.

        Raises:
            ValueError: there is none. The message names the option of Horovod's optimizer that leads here.
        """
        count = len(self.entries)
        for offset in range(count):
            place = (self._start + offset) % count
            if self.entries[place].parameter.grad is tensor:
                self._start = place + 1
                return self.entries[place]
        raise ValueError(self._why_not(tensor))

    def _why_not(self, tensor: Tensor) -> str:
        for entry in self.entries:
            if entry.parameter is tensor:
                return (
                    "op=Adasum is not supported: it combines parameter changes, not gradients, and a sparse "
                    "sum has no Adasum. Use op=hvd.Average or hvd.Sum"
                )
            grad = entry.parameter.grad
            if grad is not None and grad.is_sparse and grad.shape == tensor.shape:
                return (
                    f"sparse_as_dense=True is not supported with this compression ({entry.name}): the dense "
                    "copy hides which parameter it belongs to. Use nn.Embedding(sparse=False), or "
                    "commhooks.horovod.DistributedOptimizer(sparse_as_dense=True)"
                )
        return (
            f"a tensor of shape {tuple(tensor.shape)} is the gradient of no parameter in named_parameters: "
            "give the compression the same named_parameters as the optimizer (it serves optimizers, not "
            "hvd.allreduce)"
        )


def check_named(named_parameters: Any) -> list[tuple[str, Tensor]]:
    """Returns ``named_parameters`` as a list.

    Raises:
        ValueError: it is empty, holds something else than (name, Tensor), or holds a name twice.
    """
    pairs = list(named_parameters)
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            raise ValueError(
                f"named_parameters must hold (name, parameter) tuples, got {type(pair).__name__}"
            )
        if not isinstance(pair[1], Tensor):
            raise ValueError(
                f"named_parameters must hold tensors, got {type(pair[1]).__name__} for {pair[0]!r}"
            )
    names = [name for name, _ in pairs]
    if not pairs or len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"named_parameters must be unique and not empty, got {twice or 'nothing'}")
    return pairs


def mask_key_of(name: str) -> int:
    """Returns 63 bits of a hash of the name, the same on all ranks."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1
