"""One thread that owns a state's communication and takes its buckets in order."""

from __future__ import annotations

import atexit
import queue
import threading
import weakref
from collections.abc import Callable

_Task = Callable[[], None]
_threads: weakref.WeakSet[CommThread] = weakref.WeakSet()


class CommThread:
    """Runs tasks one after the other in a thread that starts with the first task.

    After a fork, or after :meth:`close`, the next task starts a new thread. The thread ends with the object.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, task: _Task) -> None:
        """Queues ``task``; it must not raise."""
        if self._thread is None or not self._thread.is_alive():
            self._start()
        self._tasks.put(task)

    def wait(self) -> None:
        """Returns when all tasks queued so far are done."""
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
            # Python's own shutdown must not meet a thread that is inside torch or MPI. This handler is
            # registered later than that of the transports, hence it runs before they close.
            atexit.unregister(_close_all)
            atexit.register(_close_all)
        _threads.add(self)


def _run(tasks: queue.SimpleQueue[_Task | None]) -> None:
    while (task := tasks.get()) is not None:
        task()
        del task  # it holds its state, which would wait for the next task to be freed


def _close_all() -> None:
    for thread in list(_threads):
        thread.close()
