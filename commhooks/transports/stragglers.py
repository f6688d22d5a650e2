"""Which ranks have not come to a collective, as far as the process group's store knows."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
logger = logging.getLogger(__name__)

_STORE_LIMIT_S = 3.0
"""The store may live in the very process that stalls: nobody waits longer for it."""


class Stragglers:
    """Ranks that wait long in a collective say so in ``store``; one that fails there reads who did not.

    Costs nothing where nobody waits long, and one short entry per rank is all the store ever holds.

    Args:
        store: a ``torch.distributed`` store of the group's ranks; None: nobody will be missed.
        rank: this rank in the group.
        world_size: the group's.
    """

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size

    def wait_in(self, number: int) -> bool:
        """Tells the others that this rank waits in its ``number``-th collective; False if that failed."""

        def write(store: Any) -> bool:
            store.set(_key(self._rank), str(number))
            return True

        return self._bounded(write, False)

    def missing(self, number: int) -> list[int]:
        """The ranks that have told of no wait in the ``number``-th collective or a later one; [] without a
        store.
        """

        def read(store: Any) -> list[int]:
            others = [r for r in range(self._world_size) if r != self._rank]
            return [r for r in others if not (store.check([_key(r)]) and int(store.get(_key(r))) >= number)]

        return self._bounded(read, [])

    def _bounded(self, ask: Callable[[Any], T], otherwise: T) -> T:
        """What ``ask(store)`` returns within the limit; a store that has failed once is not asked again."""
        if self._store is None:
            return otherwise
        store, answers = self._store, []

        def run() -> None:
            try:
                answers.append(ask(store))
            except Exception as error:  # stores raise what they like, and the rank has worse to tell of
                logger.debug("no answer from the process group's store: %s", error)

        thread = threading.Thread(target=run, name="commhooks roll call", daemon=True)
        thread.start()
        thread.join(_STORE_LIMIT_S)
        if answers:
            return answers[0]
        self._store = None
        return otherwise


def _key(rank: int) -> str:
    return f"waits/{rank}"
