"""Access to Horovod: import, version check, session, process sets, waiting with a deadline."""

from __future__ import annotations

import importlib
import os
import time
from typing import Any

from ..errors import PeerTimeoutError
from ..transports.deadline import Deadline

SUPPORTED = "0.28"
_POLL_S = 2e-4


def horovod() -> Any:
    """Imports and returns ``horovod.torch``.

    Raises:
        ImportError: it is absent or was built for another torch. The message says what to do.
    """
    try:
        return importlib.import_module("horovod.torch")
    except ImportError as error:
        raise ImportError(
            "commhooks.horovod needs Horovod 0.28.x built for the installed torch: run "
            f"scripts/install_horovod (3 to 8 minutes the first time). ({error})"
        ) from error


def is_supported() -> bool:
    """Whether Horovod is 0.28.x, the version whose private parts this package was written against."""
    return _version().split("+")[0].split(".")[:2] == SUPPORTED.split(".")


def require_version() -> None:
    """Raises ``RuntimeError`` unless Horovod is 0.28.x: this package uses private parts of it."""
    if not is_supported():
        raise RuntimeError(
            f"commhooks.horovod.DistributedOptimizer supports Horovod {SUPPORTED}.x, found {_version()}: it "
            "relies on parts of Horovod that are not public. Install 0.28.1 (scripts/install_horovod), or "
            "use the stock hvd.DistributedOptimizer with commhooks.horovod.Compression, which needs only "
            "public parts"
        )


def _version() -> str:
    return str(importlib.import_module("horovod").__version__)


def session() -> object:
    """Returns an object that identifies the current Horovod session. An elastic reset replaces it."""
    return importlib.import_module("horovod.torch.mpi_ops")._handle_map


def is_elastic() -> bool:
    """Whether an elastic launcher started this process."""
    return os.environ.get("HOROVOD_ELASTIC") == "1"


def check_process_set(process_set: Any) -> Any:
    """Returns ``process_set``, or the global one for None.

    Raises:
        ValueError: Horovod is not initialized, or the process set is not registered.
    """
    hvd = horovod()
    chosen = hvd.global_process_set if process_set is None else process_set
    if not hvd.is_initialized():
        raise ValueError("Horovod is not initialized: call hvd.init() first")
    if getattr(chosen, "process_set_id", None) is None:
        raise ValueError(f"process_set must be registered (hvd.add_process_set), got {process_set!r}")
    return chosen


def wait_for(handle: int, timeout_s: float, what: str) -> Any:
    """Waits for an asynchronous Horovod operation and returns its result.

    Args:
        handle: of the operation.
        timeout_s: seconds until the wait is given up.
        what: names the operation in errors.

    Raises:
        PeerTimeoutError: it is not complete after ``timeout_s`` seconds.
        ValueError: it is an all-gather and some rank has joined (``hvd.join()``).
    """
    hvd = horovod()
    deadline = Deadline(timeout_s)
    while not hvd.poll(handle):
        if deadline.has_passed():
            raise PeerTimeoutError(
                f"rank {hvd.rank()}, {what}: no answer from any rank within {timeout_s:g} s"
            )
        time.sleep(_POLL_S)
    try:
        return hvd.synchronize(handle)
    except hvd.HorovodInternalError as error:
        if "with Join" not in str(error):
            raise
        raise ValueError(
            f"rank {hvd.rank()}, {what}: a rank called hvd.join(), beside which Horovod gathers nothing. "
            "Compression.randomk allows it once every rank has done a step (again after loading), topk never"
        ) from error
