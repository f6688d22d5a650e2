"""``Stragglers``: finds the ranks that have not joined a collective, by the process group's store."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
logger = logging.getLogger(__name__)

_STORE_LIMIT_S = 3.0
"""Longest wait for the store in seconds, since the stalled process may be the one that serves it."""


class Stragglers:
    """Finds the ranks that have not joined a collective in which this rank waits.

    A rank that waits long in a collective writes the collective's number to ``store``. A rank whose
    collective fails reads which ranks have not written it. A short wait costs nothing. The store holds one
    short entry per rank.

    Args:
        store: a ``torch.distributed`` store of the group's ranks. None: no rank is ever reported.
        rank: this rank in the group.
        world_size: number of ranks in the group.
    """

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size

    def wait_in(self, number: int) -> bool:
        """Tells the others that this rank waits in its ``number``-th collective. Returns whether it did."""

        def write(store: Any) -> bool:
            store.set(_key(self._rank), str(number))
            return True

        return self._bounded(write, False)

    def missing(self, number: int) -> list[int]:
        """Returns the other ranks that report no wait in the ``number``-th collective or a later one.

        Empty without a store or without its answer.
        """

        def read(store: Any) -> list[int]:
            others = [r for r in range(self._world_size) if r != self._rank]
            return [r for r in others if not (store.check([_key(r)]) and int(store.get(_key(r))) >= number)]

        return self._bounded(read, [])

    def _bounded(self, ask: Callable[[Any], T], otherwise: T) -> T:
        """Returns ``ask(store)``, or ``otherwise`` without an answer within ``_STORE_LIMIT_S``.

        A store that has not answered once is not asked again.
        """
        if self._store is None:
            return otherwise
        store, answers = self._store, []

        def run() -> None:
            try:
                answers.append(ask(store))
            except Exception as error:  # of any type; the error of the collective is the one to report
                logger.debug("no answer from the process group's store: %s", error)

        thread = threading.Thread(target=run, name="commhooks stragglers", daemon=True)
        thread.start()
        thread.join(_STORE_LIMIT_S)
        if answers:
            return answers[0]
        self._store = None
        return otherwise


def _key(rank: int) -> str:
    return f"waits/{rank}"
