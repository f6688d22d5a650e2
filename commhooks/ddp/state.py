"""``SparseState``: what DDP hands to the hook at every bucket."""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from ..exchange import Aggregator
from ..gradient.bucket import Bucket
from ..gradient.side_stream import stream_after
from ..memory import Memory
from ..reduction.reducer import Reducer
from ..schemes import UNSET, chosen_memory, make_parts
from ..selection.density import DensitySchedule
from ..selection.selectors import Selector
from ..transports import DEFAULT_TIMEOUT_S, Transport
from .comm_thread import CommThread
from .step_watch import StepWatch

logger = logging.getLogger(__name__)


class SparseState:
    """Selector, aggregator and memory of one DDP model, and the thread that communicates for it.

    Example:
        >>> state = SparseState(TopK(density=0.001), GTopK(transport="mpi"), ErrorFeedback(momentum=0.9))
        >>> ddp_model.register_comm_hook(state, sparse_hook)  # or: commhooks.register(ddp_model, state)

    Args:
        selector: which places of a gradient are sent; None with ``Dense``.
        aggregator: how the ranks' selections become one sum, and over which transport.
        memory: None: ``ErrorFeedback()`` behind a selector, ``NoMemory()`` with ``Dense``, which withholds nothing.
        nonfinite: ``"propagate"``, ``"skip"`` or ``"error"``: see :class:`Reducer`.
        grad_scaler: the job's ``GradScaler``. The memory is then kept in unscaled units and a change of scale
            leaves it right. Without it a change of scale weighs what is in the memory by old over new scale.
        dense_crossover: send a bucket densely when that takes fewer bytes; or a rule: see :class:`Reducer`.
        delta_every: measure Assumption 1's delta every so many steps; 0: never.
        timeout_s: seconds until a missing rank is an error.
        process_group: whose ranks take part, for the ``"distributed"`` transport; :func:`register` gives
            DDP's.

    Attributes:
        error: what made the state fail, or None. A failed state raises it again at every later step.
        plan: what :meth:`auto` decided, or None.
        watch: sees whether the averages are used, zeroed or accumulated.
    """

    _owner: weakref.ref[Any] | None
    error: BaseException | None

    def __init__(
        self,
        selector: Selector | None,
        aggregator: Aggregator,
        memory: Memory | None = UNSET,
        *,
        nonfinite: str = "propagate",
        grad_scaler: Any = None,
        dense_crossover: bool | Callable[[int, int, int], bool] = True,
        delta_every: int = 0,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        process_group: Any = None,
    ) -> None:
        if grad_scaler is not None and not hasattr(grad_scaler, "get_scale"):
            raise TypeError(f"grad_scaler must be a GradScaler, got {type(grad_scaler).__name__}")
        self.reducer = Reducer(
            selector,
            aggregator,
            chosen_memory(memory, selector),
            nonfinite=nonfinite,
            dense_crossover=dense_crossover,
            delta_every=delta_every,
            timeout_s=timeout_s,
        )
        if aggregator.requested == "mpi":
            from ..transports.mpi import load_mpi

            load_mpi()  # MPI_Init belongs to the main thread, the first bucket comes on another
        self.grad_scaler, self.process_group = grad_scaler, process_group
        self.plan: Any = None
        self._reset_runtime()

    @classmethod
    def topk(
        cls, density: float | DensitySchedule, transport: str | Transport = "distributed", **options: Any
    ) -> SparseState:
        """Exact top-k of every rank, all-gathered; error feedback on."""
        return cls._of("topk", density, transport, **options)

    @classmethod
    def gtopk(
        cls, density: float | DensitySchedule, transport: str | Transport = "distributed", **options: Any
    ) -> SparseState:
        """Global top-k by recursive doubling; error feedback on."""
        return cls._of("gtopk", density, transport, **options)

    @classmethod
    def randomk(
        cls,
        density: float | DensitySchedule,
        transport: str | Transport = "distributed",
        *,
        seed: int = 0,
        **options: Any,
    ) -> SparseState:
        """Random-k under a mask all ranks share, values all-reduced; error feedback on."""
        return cls._of("randomk", density, transport, seed, **options)

    @classmethod
    def dense(cls, transport: str | Transport = "distributed", **options: Any) -> SparseState:
        """Everything, by all-reduce in float32: the baseline on the same transport."""
        return cls._of("dense", None, transport, **options)

    @classmethod
    def _of(
        cls,
        scheme: str,
        density: float | DensitySchedule | None,
        transport: str | Transport,
        seed: int = 0,
        memory: Memory | None = UNSET,
        **options: Any,
    ) -> SparseState:
        """A state of a named scheme."""
        selector, aggregator, _ = make_parts(scheme, density, transport, seed=seed)
        return cls(selector, aggregator, memory, **options)

    @classmethod
    def auto(cls, model: Any, transport: str | Transport = "distributed", **options: Any) -> Any:
        """Probes network and device and takes what the cost model says; a collective call.

        All ranks decide alike and rank 0 logs the plan. Buckets for which sparse exchange would be slower go dense.

        Args:
            model: the module (a wrapped one's bucket cap is kept), or its number of parameters.
            transport: ``"distributed"``, ``"mpi"`` or a ``Transport``.
            options: ``densities``, ``backward_s``, ``device`` and ``probe_timeout_s`` for the plan
                (:mod:`commhooks.planner.auto`); the rest is this class's. Of a ``memory`` a dense plan keeps momentum and clipping.

        Returns:
            A state whose attribute ``plan`` tells what was chosen and why, with the ``bucket_cap_mb`` to give DDP.
        """
        # By name: the planner is built on this module, not the other way round.
        return import_module("commhooks.planner.auto").auto(cls, model, transport, **options)

    def submit(
        self, buffer: Tensor, index: int, parameters: tuple[Hashable, ...], is_last: bool
    ) -> Future[Tensor]:
        """Queues one bucket and returns at once.

        Args:
            buffer: shape ``(n,)``, the bucket's gradient, overwritten with the average over ranks.
            index: the bucket's number.
            parameters: its parameters, in the buffer's order.
            is_last: whether it is the step's last bucket.

        Returns:
            A future of ``buffer``; a failure is raised where the future's value is used.
        """
        stale = self.watch.take(parameters)
        devices: list[Any] = [buffer.device] if buffer.device.type == "cuda" else []
        done: Future[Tensor] = Future(devices=devices)
        if self._passthrough or self.error is not None:
            done.set_result(buffer)
            return done.then(self._check)
        ready: Any = torch.cuda.Event() if devices else None  # type: ignore[no-untyped-call]
        if ready is not None:
            ready.record()

        def task() -> None:
            try:
                if self.error is None:
                    with stream_after(ready, buffer.device):
                        bucket = self._bucket(buffer, index, parameters, is_last)
                        held = bucket.take_out(stale)
                        self.reducer.reduce(bucket, self._loss_scale())
                        bucket.put_back(held)
                        if is_last:
                            self.watch.end_step(bool(self.reducer.last.nonfinite_buckets))
                        done.set_result(buffer)
                        return
            except BaseException as error:
                self._fail(error)
            done.set_result(buffer)

        self._thread.submit(task)
        return done.then(self._check)

    def set_names(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Names the parameters, for ``state_dict`` and messages; :func:`register` does it."""
        named = list(named_parameters)
        self.reducer.memory.table.names.update({p: name for name, p in named})
        for name, parameter in named:
            if parameter.requires_grad and parameter.is_leaf:
                self.watch.add(parameter, name)

    def attach(self, owner: Any) -> None:
        """Claims the state for one model.

        Raises:
            ValueError: it belongs to another model already.
        """
        if self._owner is not None and self._owner() not in (None, owner):
            raise ValueError("this SparseState has a model already; each DDP model needs a state of its own")
        # Weakly: DDP's C++ part holds this state, and a cycle through C++ would never be collected.
        self._owner = weakref.ref(owner)

    def open(self, device_type: str | None = None) -> None:
        """Opens the transport: a collective call. The first bucket does so by itself.

        Args:
            device_type: where the gradients are; None: on GPUs when the process group runs NCCL.

        Raises:
            ValueError: the transport's world size is not the process group's.
        """
        if device_type is None:
            device_type = "cuda" if torch.cuda.is_available() else "cpu"
        self.reducer.open(self.process_group, device_type)
        if dist.is_available() and dist.is_initialized():
            expected = dist.get_world_size(self.process_group)
            actual = self.reducer.transport.world_size
            if actual != expected:
                raise ValueError(
                    f"the transport connects {actual} ranks and DDP's process group {expected}: "
                    "start the job by the mpiexec of the MPI library that mpi4py uses"
                )

    @contextmanager
    def passthrough(self) -> Iterator[None]:
        """Within it the hook hands each rank's own gradient back: nothing is sent, no memory is touched."""
        self._passthrough, self.watch.enabled = True, False
        try:
            yield
        finally:
            self._passthrough, self.watch.enabled = False, True

    def reset(self) -> None:
        """Forgets everything withheld: the memory is as at the start, the step 0. Call it on all ranks, between steps."""
        self._thread.wait()
        self.reducer.reset()
        self.watch.forgive()

    def raise_error(self) -> None:
        """Raises what made the state fail, if it has failed."""
        if self.error is not None:
            raise self.error

    def stats(self) -> dict[str, Any]:
        """Figures of the last step: bytes sent and received, ratio, residual norm, delta, seconds."""
        return self.reducer.stats()

    def state_dict(self) -> dict[str, Any]:
        """This rank's residuals and velocities by parameter name; save one per rank.

        Raises:
            ValueError: the parameters' names are unknown.
        """
        return self.reducer.state_dict()

    def load_state_dict(self, state: dict[str, Any] | list[dict[str, Any]]) -> None:
        """Loads this rank's state, or the list of all ranks' states of a run of any world size."""
        self.open()
        self.reducer.load_state_dict(state)
        self._steps_seen = 0

    def restart(self, saved: dict[str, Any]) -> None:
        """Goes back to this rank's own ``state_dict()`` of this run, also after a step that failed; not collective.

        What the failed step sent or withheld is forgotten: the gradients of that step are computed again.
        """
        self._steps_seen = 0
        self._indices.clear()
        self.error = None
        self.reducer.restart(saved)

    def close(self) -> None:
        """Joins the worker and closes the transport; call it on all ranks. The memory stays."""
        self._thread.close()
        self.reducer.connection.close()

    def __getstate__(self) -> dict[str, Any]:
        state = {k: v for k, v in self.__dict__.items() if k not in _RUNTIME}
        return {**state, "saved": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        saved = state.pop("saved")
        self.__dict__.update(state)
        self.process_group = self.grad_scaler = None
        self._reset_runtime()
        self.reducer.restart(saved)

    def _reset_runtime(self) -> None:
        self.error = None
        self._thread = CommThread("commhooks")
        self.watch = StepWatch()
        self._owner = None
        self._passthrough = False
        self._steps_seen = 0
        self._indices: set[int] = set()

    def _bucket(self, buffer: Tensor, index: int, parameters: tuple[Hashable, ...], is_last: bool) -> Bucket:
        """Checks that the bucket is of this state's model."""
        table = self.reducer.memory.table
        known = not self.reducer.remembers or all(table.known(p) for p in parameters)
        stranger = self._steps_seen > 0 and not known
        if index in self._indices or stranger:
            raise ValueError(
                f"bucket {index} is not of the model this SparseState serves (or came twice in one step): "
                "each DDP model needs a state of its own"
            )
        self._indices.add(index)
        if is_last:
            self._steps_seen += 1
            self._indices.clear()
        for p in parameters:
            if (
                isinstance(p, Tensor) and p.is_complex()
            ):  # DDP hands their buckets over as twice as many reals
                raise TypeError(
                    f"bucket {index}: gradients must be dense float32, bfloat16 or float16, got {p.dtype} "
                    f"({table.name_of(p)})"
                )
        numels = tuple(p.numel() for p in parameters if isinstance(p, Tensor))
        if not self.reducer.connection.is_open:
            self.open(buffer.device.type)
        return Bucket(index, buffer, parameters, numels, is_last)

    def _loss_scale(self) -> float:
        """The scale this step's loss was multiplied with (read on the worker, where waiting is harmless)."""
        if self.grad_scaler is None or not self.grad_scaler.is_enabled():
            return 1.0
        return float(self.grad_scaler.get_scale())

    def _fail(self, error: BaseException) -> None:
        self.error = error
        logger.error("communication failed: %s", error)
        if self.reducer.connection.is_open:
            self.reducer.transport.fail(error)

    def _check(self, done: Future[Tensor]) -> Tensor:
        self.raise_error()
        return done.value()


_RUNTIME = (
    "watch",
    "_thread",
    "_owner",
    "_passthrough",
    "_steps_seen",
    "_indices",
    "process_group",
    "grad_scaler",
    "error",
)


def warn_of_double_momentum(memory: Memory, optimizer: torch.optim.Optimizer | None) -> None:
    """Warns when the optimizer has a momentum beside the memory's."""
    ours = float(getattr(memory, "momentum", 0.0))
    if optimizer is None or ours == 0.0:
        return
    theirs = max((float(g.get("momentum", 0.0)) for g in optimizer.param_groups), default=0.0)
    if theirs > 0.0:
        warnings.warn(
            f"the optimizer's momentum {theirs:g} and ErrorFeedback's {ours:g} both act: "
            "momentum belongs to one place, set the optimizer's to 0",
            stacklevel=3,
        )
