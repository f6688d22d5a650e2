"""One thread that owns a state's communication and takes its buckets in order."""

from __future__ import annotations

import atexit
import queue
import threading
import weakref
from collections.abc import Callable

_Task = Callable[[], None]


class CommThread:
    """Runs tasks one after the other in a thread that starts with the first task.

    After a fork, or after :meth:`close`, the next task starts a new thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self_reference = weakref.ref(self)

        def close_at_exit() -> None:
            worker = self_reference()
            if worker is not None:
                worker.close()

        # Python's own shutdown must not meet a thread that is inside torch or MPI.
        atexit.register(close_at_exit)

    def submit(self, task: _Task) -> None:
        """Queues ``task``; it must not raise."""
        if self._thread is None or not self._thread.is_alive():
            self._tasks = queue.SimpleQueue()
            self._thread = threading.Thread(target=_run, args=(self._tasks,), name=self._name, daemon=True)
            self._thread.start()
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


def _run(tasks: queue.SimpleQueue[_Task | None]) -> None:
    while (task := tasks.get()) is not None:
        task()
