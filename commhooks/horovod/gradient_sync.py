"""``GradientSync``: passes gradients from autograd's hooks to the state's thread, in ordered buckets."""

from __future__ import annotations

import atexit
import functools
import logging
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from torch import Tensor

from ..ddp.state import SparseState
from ..errors import PeerLostError, PeerTimeoutError
from ..transports import default_timeout, finalization
from ..transports.mpi import abort, load_mpi
from .api import horovod, is_elastic, session
from .buckets import FusedBucket
from .parameters import SCALER_ORDER
from .transport import open_transport

logger = logging.getLogger(__name__)

_LEAVE_S = 10.0  # how long a rank waits for the others when it leaves
_LEAVE_TAG = 32767  # no exchange is under way when ranks leave
_all: weakref.WeakSet[GradientSync] = weakref.WeakSet()


class GradientSync:
    """Watches the parameters, submits full buckets in order, and writes the averages into the gradients.

    Args:
        state: selector, aggregator, memory and communication thread.
        buckets: the partition, in the order of exchange.
        names: by parameter.
        passes: backward passes per step.
        sums: give the sum instead of the average.
        process_set: whose ranks take part. This rank is one of them.
        sparse: whether sparse gradients are ``"refused"`` or ``"taken"``, or are the ``"only"`` ones that the
            optimizer takes (SparseAdam).
    """

    def __init__(
        self,
        state: SparseState,
        buckets: Sequence[FusedBucket],
        names: dict[Tensor, str],
        *,
        passes: int,
        sums: bool,
        process_set: Any,
        sparse: str,
    ) -> None:
        state.attach(self, average=not sums, steps_all=True)
        state.set_names((name, p) for p, name in names.items())
        self.state, self.buckets, self.names, self.process_set = state, list(buckets), names, process_set
        self.passes, self.sparse = passes, sparse
        self._session: object = None
        self._at_exit: Callable[[], None] | None = None
        self._lock = threading.Lock()  # gradients on several devices arrive on several threads
        self._bucket_of = {p: bucket for bucket in self.buckets for p in bucket.parameters}
        self._remaining = dict.fromkeys(self._bucket_of, passes)
        self._next = 0
        self.touched, self._ignores = False, False
        self._versions: dict[Tensor, int] = {}  # of the gradients that were copied into buckets
        for p in self._bucket_of:
            p.register_post_accumulate_grad_hook(self._on_gradient)  # type: ignore[no-untyped-call]
        if not is_elastic():  # in an elastic job a new worker must first pass hvd.elastic's own sync
            self.open()
        _all.add(self)
        finalization.add_exchanger(self)

    def open(self) -> None:
        """Opens the transport unless this session has it open. A collective call of the process set."""
        if self._session is session():
            return
        state, connection = self.state, self.state.reducer.connection
        if self._session is not None or connection.is_open:
            _close_stale()
            _quietly(state.close)
            state.restart(state.state_dict())  # a new rank asks for agreement on each layout
        timeout_s = state.reducer.timeout_s or default_timeout()
        try:
            opened = open_transport(connection.requested, self.process_set, timeout_s)
        except (PeerLostError, PeerTimeoutError) as error:
            self._raise(error)
        state.open(given=opened)
        self._session = session()
        self._close_at_exit()

    def set_passes(self, passes: int) -> None:
        """Changes the number of backward passes per step, between steps."""
        self.passes = passes
        self._remaining = dict.fromkeys(self._remaining, passes)

    def _on_gradient(self, parameter: Tensor) -> None:
        if self._ignores:
            return
        with self._lock:
            self.touched = True
            grad = parameter.grad
            if self._remaining[parameter] == 0:
                if grad is not None:
                    self._versions[parameter] = grad._version  # this error is enough
                raise RuntimeError(
                    f"{self.names[parameter]} got more than backward_passes_per_step={self.passes} gradients "
                    "before step(): raise backward_passes_per_step to accumulate gradients locally"
                )
            if grad is not None and grad.is_sparse and self.sparse == "refused":
                raise ValueError(
                    f"{self.names[parameter]} has a sparse gradient: give sparse_as_dense=True, or use "
                    "nn.Embedding(sparse=False)"
                )
            self._remaining[parameter] -= 1
            if self._remaining[parameter] == 0:
                self._bucket_of[parameter].fill(parameter)
                if grad is not None:
                    self._versions[parameter] = grad._version
                self._submit_full()

    def _submit_full(self) -> None:
        """Submits buckets in their order, up to the first one that lacks a gradient."""
        while self._next < len(self.buckets) and not self.buckets[self._next].missing:
            self.open()
            bucket = self.buckets[self._next]
            is_last = self._next == len(self.buckets) - 1
            bucket.future = self.state.submit(bucket.buffer, self._next, bucket.parameters, is_last)
            self._next += 1

    def synchronize(self) -> None:
        """Completes the step's exchange and overwrites all gradients, also of parameters not used here.

        Raises:
            CommHooksError: what made the exchange fail.
            RuntimeError: a gradient was changed since its backward pass, by a GradScaler's ``step`` for
                example. The change would be lost.
        """
        for parameter, version in self._versions.items():
            if parameter.grad is not None and parameter.grad._version != version:
                raise RuntimeError(
                    f"the gradient of {self.names[parameter]} was changed between backward() and "
                    f"synchronize(): that would be lost. The order is: {SCALER_ORDER}"
                )
        with self._lock:
            for bucket in self.buckets:
                for parameter in sorted(bucket.missing, key=lambda p: self.names[p]):
                    bucket.fill(parameter)
            self._submit_full()
        error: BaseException | None = None
        for bucket in self.buckets:
            try:
                bucket.future.wait()
            except Exception as problem:
                # torch may have changed its type on the way: the state has the original.
                error = error or self.state.error or problem
            else:
                self._hand_back(bucket)
        self.reset()
        if error is not None:
            self._raise(error)

    def reset(self) -> None:
        """Forgets which gradients have arrived. First waits for running exchanges, which use the memory."""
        self.state.forget_waiting()
        for bucket in self.buckets:
            if bucket.future is not None:
                _quietly(bucket.future.wait)
            bucket.future = None
            bucket.missing = set(bucket.parameters)
        self._remaining = dict.fromkeys(self._remaining, self.passes)
        self._next, self.touched = 0, False
        self._versions.clear()

    @contextmanager
    def ignored(self) -> Iterator[None]:
        """Ignores the gradients of backward passes inside this context."""
        self._ignores = True
        try:
            yield
        finally:
            self._ignores = False

    def rewind(self, residuals: dict[str, Any]) -> None:
        """Puts this rank's memory back to a state dict of its own, and forgets a failed step.

        It is not collective. It waits for running exchanges, which may take until their timeout.
        """
        self.reset()
        self.state.restart(residuals)

    def _hand_back(self, bucket: FusedBucket) -> None:
        for parameter, view in bucket.views.items():
            grad = parameter.grad  # None: another rank may have used it, and all ranks take the same update
            if grad is not None and grad.is_sparse:
                parameter.grad = view.clone().to_sparse(grad.sparse_dim())
            elif grad is None:
                parameter.grad = view.clone().to_sparse(1) if self.sparse == "only" else view.clone()
            else:
                grad.copy_(view)

    def check_members(self, param_groups: Sequence[dict[str, Any]]) -> None:
        """Raises ``RuntimeError`` when a parameter that trains is not exchanged: ranks would part."""
        for number, group in enumerate(param_groups):
            for p in group["params"]:
                if p.requires_grad and p not in self._bucket_of:
                    name = self.names.get(p, f"a parameter of shape {tuple(p.shape)}")
                    raise RuntimeError(
                        f"{name} (group {number}) was added or unfrozen after DistributedOptimizer was made, "
                        "so its gradient is not averaged: wrap the optimizer anew, with a new state"
                    )

    def _raise(self, error: BaseException) -> NoReturn:
        """Raises the error. Under an elastic launcher a lost peer is Horovod's own error type.

        Horovod answers that type by restoring a commit.
        """
        if is_elastic() and isinstance(error, (PeerLostError, PeerTimeoutError)):
            raise horovod().HorovodInternalError(str(error)) from error
        raise error

    @property
    def is_exchanging(self) -> bool:
        """Whether a submitted bucket is still on its way."""
        return any(bucket.future is not None and not bucket.future.done() for bucket in self.buckets)

    def leave(self) -> None:
        """Waits for all ranks, then joins the communication thread and closes the transport.

        The first rank whose ``hvd.shutdown()`` runs shuts Horovod down on all ranks, and MPI too where
        Horovod has started it. No rank may still be exchanging then. Nothing is closed if the other ranks do
        not come within 10 s, if the state has failed, or in the middle of a step. After ``hvd.shutdown()``
        over MPI it closes without waiting.
        """
        state, connection = self.state, self.state.reducer.connection
        if state.error is not None or not connection.is_open or self._next != 0:
            return
        transport = connection.transport
        if transport.is_alive:
            try:
                with transport.shorter_timeout(_LEAVE_S):
                    transport.barrier(tag=_LEAVE_TAG, what="leaving")
            except Exception as error:  # the others are gone already
                logger.debug("left alone: %s", error)
                return
        self._session = None
        _quietly(state.close)

    def _close_at_exit(self) -> None:
        """Registers :meth:`leave` to run at exit, for each session anew.

        Exit handlers run in reverse order. So it runs before those of Horovod and of our process group, which
        were registered for the same session just before.
        """
        if self._at_exit is not None:
            atexit.unregister(self._at_exit)
        self._at_exit = functools.partial(_at_exit, weakref.ref(self))
        atexit.register(self._at_exit)


def _close_stale() -> None:
    """Closes all optimizers' transports of an earlier session: their groups share one default group."""
    for sync in list(_all):
        if sync._session is not session() and sync.state.reducer.connection.is_open:
            _quietly(sync.state.close)


def _quietly(action: Any) -> None:
    try:
        action()
    except Exception as error:  # the old connection may be broken already
        logger.debug("closing: %s", error)


def _at_exit(reference: weakref.ref[GradientSync]) -> None:
    sync = reference()
    if sync is None:
        return
    connection = sync.state.reducer.connection
    if hasattr(sys, "last_value") and connection.is_open and connection.transport.name == "mpi":
        # An exception ends this process. Horovod would finalize MPI on ranks that still exchange, and these
        # would wait for this one.
        sys.stdout.flush()
        abort(load_mpi())
    sync.leave()
