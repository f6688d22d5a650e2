"""Duplicates of MPI communicators, reused instead of freed, since freeing one needs all ranks."""

from __future__ import annotations

import gc
from array import array
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from ..errors import CommHooksError, PeerLostError

_COLLECT_FROM = 8  # with so many in use, some of their transports may be garbage that is not yet collected

_pools: dict[tuple[int, ...], list[Duplicate]] = defaultdict(list)


class Duplicate:
    """A communicator of our own over the ranks of a parent.

    An MPI library has about two thousand communicators. The duplicate of a transport that is closed or
    garbage-collected on every rank is reused by the next transport of the same ranks.

    Attributes:
        comm: the mpi4py communicator.
        in_use: whether a transport of this rank works on it.
    """

    def __init__(self, comm: Any) -> None:
        self.comm, self.in_use = comm, False

    def release(self) -> None:
        """Marks the duplicate as unused by this rank. Local, and safe in a finalizer on any thread."""
        self.in_use = False


def duplicate(mpi: Any, parent: Any, complete: Callable[[Callable[[], Any]], Any]) -> Duplicate:
    """Returns the first duplicate of ``parent`` that is unused on every rank, or a new one. Collective.

    Args:
        mpi: the module ``mpi4py.MPI``.
        parent: the communicator whose ranks take part, an intracommunicator.
        complete: starts an operation and waits for it. The operation is a function that returns its request.

    Raises:
        CommHooksError: MPI has no communicator left. The message says how many are in use.
    """
    ranks = _world_ranks(mpi, parent)
    pool = [] if mpi.UNDEFINED in ranks else _pools[ranks]
    found = _first_free(mpi, parent, pool, complete)
    if found is None and len(pool) >= _COLLECT_FROM:
        gc.collect()
        found = _first_free(mpi, parent, pool, complete)
    if found is None:
        pool.append(found := Duplicate(_new(parent, complete, len(pool))))
    found.in_use = True
    return found


def _new(parent: Any, complete: Callable[[Callable[[], Any]], Any], used: int) -> Any:
    made: list[Any] = []

    def start() -> Any:
        comm, request = parent.Idup()
        made.append(comm)
        return request

    try:
        complete(start)
    except PeerLostError as error:
        raise CommHooksError(
            f"MPI gave no communicator beside the {used} that our open transports have: close() the states "
            f"and averagers that are done. ({error})"
        ) from error
    return made[0]


def _first_free(
    mpi: Any, parent: Any, pool: list[Duplicate], complete: Callable[[Callable[[], Any]], Any]
) -> Duplicate | None:
    """Returns the first duplicate in ``pool`` that is unused on every rank, or None. Collective.

    All ranks made the same duplicates in the same order, so that the ranks can vote by position.
    """
    if not pool:
        return None
    free = array("i", [not d.in_use for d in pool])
    complete(lambda: parent.Iallreduce(mpi.IN_PLACE, free, op=mpi.MIN))
    return next((d for d, everywhere in zip(pool, free, strict=True) if everywhere), None)


def _world_ranks(mpi: Any, comm: Any) -> tuple[int, ...]:
    """Returns the ranks of ``comm`` in COMM_WORLD. Communicators of equal tuples share their duplicates."""
    group, world = comm.Get_group(), mpi.COMM_WORLD.Get_group()
    ranks = tuple(mpi.Group.Translate_ranks(group, list(range(group.Get_size())), world))
    group.Free()
    world.Free()
    return ranks
