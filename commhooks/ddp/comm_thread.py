"""``CommThread``: the thread that does a state's communication, bucket by bucket, in order."""

from __future__ import annotations

import atexit
import queue
import threading
import weakref
from collections.abc import Callable

from ..native import cores

_Task = Callable[[], None]
_threads: weakref.WeakSet[CommThread] = weakref.WeakSet()


class CommThread:
    """Runs tasks one after the other in a thread of its own, which starts with the first task.

    After a fork, or after :meth:`close`, the next task starts a new thread. The thread ends when the object
    is collected, and at the latest when Python exits.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, task: _Task) -> None:
        """Queues ``task``, which must not raise."""
        if self._thread is None or not self._thread.is_alive():
            self._start()
        self._tasks.put(task)

    def wait(self) -> None:
        """Waits until all tasks queued so far are done. On the thread itself it returns at once."""
        if (
            self._thread is not None
            and self._thread.is_alive()
            and self._thread is not threading.current_thread()
        ):
            done = threading.Event()
            self._tasks.put(done.set)
            done.wait()

    def close(self) -> None:
        """Lets queued tasks finish and joins the thread."""
        if self._thread is not None and self._thread.is_alive():
            self._tasks.put(None)
            self._thread.join()
        self._thread = None

    def _start(self) -> None:
        self._tasks = queue.SimpleQueue()
        self._thread = threading.Thread(target=_run, args=(self._tasks,), name=self._name, daemon=True)
        self._thread.start()
        weakref.finalize(self, self._tasks.put, None).atexit = False
        if not _threads:
            # No thread may be inside torch or MPI while Python shuts down. This handler is registered after
            # that of the transports, so it runs before they close.
            atexit.unregister(_close_all)
            atexit.register(_close_all)
        _threads.add(self)


def _run(tasks: queue.SimpleQueue[_Task | None]) -> None:
    cores.unpin()  # else it would share the main thread's core with backward under OMP_PROC_BIND
    while (task := tasks.get()) is not None:
        task()
        del task  # it holds its state, which could not be freed before the next task


def _close_all() -> None:
    for thread in list(_threads):
        thread.close()
