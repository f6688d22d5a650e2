"""Process groups of our own. They are closed with their transport, or at the latest before Python exits."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)

_open: set[OwnGroup] = set()
_garbage: deque[OwnGroup] = deque()  # a finalizer only appends, which is safe on any thread


class OwnGroup:
    """A new process group over global ``ranks``. Creating it is collective over them.

    A thread of gloo releases a collective's tensors after the collective's end and takes the interpreter lock
    for that. If it takes the lock while Python shuts down, the process ends by ``std::terminate``. So an exit
    handler closes every group before that. It is registered when this module is imported and therefore runs
    after the exit handlers of all threads that use a group.

    Args:
        ranks: global ranks, ascending.
        backend: ``"gloo"`` or ``"nccl"``.
        timeout_s: timeout of the group's operations in seconds.
    """

    def __init__(self, ranks: Sequence[int], backend: str, timeout_s: float) -> None:
        close_garbage()
        self.group: Any = new_group(ranks, backend, timeout_s)
        device = torch.device("cuda" if backend == "nccl" else "cpu")
        self._backend: Any = self.group._get_backend(device)
        self._process = os.getpid()
        _open.add(self)

    @property
    def is_alive(self) -> bool:
        """False once the group was closed, here or with the process's default group."""
        if self.group is None:
            return False
        try:
            dist.get_rank(self.group)
        except (ValueError, RuntimeError):
            return False
        return True

    def close(self) -> None:
        """Ends the group's threads and closes its connections.

        The call needs no other rank. A second call does nothing. In a forked child it does nothing, since the
        threads are the parent's.
        """
        if self.group is None or os.getpid() != self._process:
            return
        if self.is_alive:
            dist.destroy_process_group(self.group)
        # The backend is released last, by its own Python object, which joins the threads without holding the
        # interpreter lock. Released with the group, it could hold the lock that one of its threads waits for.
        self.group = None
        self._backend = None
        _open.discard(self)

    def leave_as_garbage(self) -> None:
        """Marks the group to be closed when the next one is made, or at exit.

        Safe in a finalizer, on any thread.
        """
        _garbage.append(self)


def new_group(ranks: Sequence[int], backend: str, timeout_s: float) -> Any:
    """Makes a process group of global ``ranks``, which only these ranks need to enter.

    torch names a group of some ranks by its ranks and the number of groups that the process has. A group made
    after another was closed may then get that one's name, under which the store still has the addresses of
    closed connections. Ranks that have different numbers of groups would never meet. The name here counts
    the groups that were made of these ranks. The count is in the store.

    Args:
        ranks: global ranks, this one among them.
        backend: ``"gloo"`` or ``"nccl"``.
        timeout_s: timeout of the group's operations in seconds.
    """
    limit, ranks, here = timedelta(seconds=timeout_s), sorted(ranks), dist.get_rank()
    if len(ranks) == dist.get_world_size():  # torch numbers these groups
        return dist.new_group(ranks, timeout=limit, backend=backend)
    c10d: Any = dist.distributed_c10d  # torch has no public way to a group's name
    store, name = c10d._get_default_store(), f"commhooks/{'_'.join(map(str, ranks))}"
    counter = f"{name}/made by {here}"
    number = store.add(counter, 1)
    try:
        group, _ = c10d._new_process_group_helper(
            len(ranks),
            ranks.index(here),
            ranks,
            dist.Backend(backend),
            store,
            f"{name}/{number}",
            timeout=limit,
        )
    except Exception:
        store.add(counter, -1)  # the ranks that did not come have not counted
        raise
    c10d._world.pg_group_ranks[group] = {rank: place for place, rank in enumerate(ranks)}
    return group


def smaller_groups() -> list[list[int]]:
    """Returns the global ranks of the program's groups that hold this rank and not all ranks.

    Groups of our own are left out. Without ``torch.distributed`` there are none.
    """
    if not dist.is_available() or not dist.is_initialized():
        return []
    ours = [own.group for own in list(_open)]
    world: Any = dist.distributed_c10d._world
    found = []
    for group, ranks in list(world.pg_group_ranks.items()):
        if dist.get_rank() in ranks and len(ranks) < dist.get_world_size():
            if not any(group is own for own in ours):
                found.append(sorted(ranks))
    return found


def leave() -> NoReturn:
    """Ends the process with status 0 and not by Python's own shutdown. MPI is finalized.

    Torch keeps the gloo threads of a process group that a DDP model has used, also after
    ``destroy_process_group``. Such a thread may still release a collective's tensors, for which it needs the
    interpreter. Python's shutdown kills it there, and the process aborts ("terminate called without an active
    exception"). Exit handlers do not run.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    if "mpi4py.MPI" in sys.modules:
        from mpi4py import MPI

        if MPI.Is_initialized() and not MPI.Is_finalized():
            MPI.Finalize()
    os._exit(0)


def close_garbage() -> None:
    """Closes the groups whose transports have been garbage-collected."""
    while _garbage:
        _garbage.popleft().close()


def _close_all() -> None:
    for group in list(_open):
        try:
            group.close()
        except Exception as error:  # a broken connection may raise; the other groups are closed all the same
            logger.debug("closing a process group at exit: %s", error)


atexit.register(_close_all)
