"""``DistributedOptimizer``: a Horovod optimizer on fused buckets, with the schemes of the DDP hook."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..ddp.optimizers import check_optimizer
from ..ddp.state import SparseState
from ..errors import callers_level, says_what_to_write
from ..memory import ErrorFeedback
from .api import check_process_set, horovod, require_version
from .buckets import partition
from .gradient_sync import GradientSync
from .parameters import SCALER_ORDER, check_named


class SparseOptimizer:
    """The methods that :func:`DistributedOptimizer` adds to the user's optimizer class."""

    _sync: GradientSync | None  # None on ranks outside the process set
    param_groups: list[dict[str, Any]]
    state: Any
    _synchronized = False
    _should_synchronize = True

    @property
    def sparse_state(self) -> SparseState | None:
        """The ``SparseState`` (for ``stats()``), or None on a rank outside the process set."""
        return self._sync.state if self._sync is not None else None

    @property
    def gradient_sync(self) -> GradientSync | None:
        """What exchanges the gradients, or None on a rank outside the process set."""
        return self._sync

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Torch's: whether ``step`` unscales gradients itself. ``GradScaler.step`` reads it first of all.

        Raises:
            RuntimeError: gradients are being exchanged. The scaler would unscale what the averages overwrite,
                and skip steps on single ranks.
        """
        if self._sync is not None and self._sync.touched and self._should_synchronize:
            raise RuntimeError(f"scaler.step() before synchronize(). The order is: {SCALER_ORDER}")
        return bool(self.__dict__.get("_step_supports_amp_scaling", False))

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        self.__dict__["_step_supports_amp_scaling"] = value

    def synchronize(self) -> None:
        """Waits until all gradients are averaged, and overwrites them with the averages.

        They may be clipped afterwards. Then call ``step()`` inside :meth:`skip_synchronize`. Clipping here
        loses mass: what is cut off an average is in nobody's residual. ``clip_norm`` of ``ErrorFeedback``
        clips before the memory.

        Raises:
            CommHooksError: the exchange failed.
        """
        if self._sync is not None:
            self._sync.check_members(self.param_groups)
            self._sync.synchronize()
        self._synchronized = True

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Keeps ``step()`` inside the ``with`` block from synchronizing: for use after ``synchronize()``."""
        self._should_synchronize = False
        try:
            yield
        finally:
            self._should_synchronize = True

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Calls the optimizer's own ``zero_grad``.

        Raises:
            RuntimeError: gradients are being exchanged, and zeroing them would race with the exchange.
        """
        if self._sync is not None and self._sync.touched:
            raise RuntimeError(
                "zero_grad() between backward() and step() or synchronize() would lose gradients. If they "
                "are not wanted: discard() or passthrough()"
            )
        super().zero_grad(*args, **kwargs)  # type: ignore[misc]

    def discard(self) -> None:
        """Undoes the last backward pass, as ``SparseState.discard``. Call ``zero_grad()`` afterwards.

        Waits until its exchange is complete, so all ranks must call it. ``synchronize()`` and ``zero_grad()``
        alone would lose what the pass sent.

        Raises:
            RuntimeError: the state is not ``undoable``, or there is nothing to discard.
            CommHooksError: the exchange failed.
        """
        if self._sync is not None:
            if self._sync.touched:
                self._sync.synchronize()
            self._sync.state.discard()
        self._synchronized = False

    @contextmanager
    def passthrough(self) -> Iterator[None]:
        """Leaves the gradients of backward passes inside this context alone: nothing is sent or kept."""
        if self._sync is None:
            yield
            return
        with self._sync.state.passthrough(), self._sync.ignored():
            yield

    def reset(self) -> None:
        """Sets the memory to zero and starts at step 0. Call it on all ranks between the same steps."""
        if self._sync is not None:
            self._sync.reset()
            self._sync.state.reset()
        self._synchronized = False

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Changes how many backward passes are accumulated per step. Call it between steps."""
        _check_passes(passes)
        if self._sync is not None:
            self._sync.set_passes(passes)

    def close(self) -> None:
        """Joins the communication thread and closes the transport. A collective call, between steps.

        The exit of the process does it too. When the other ranks do not come within 10 s nothing is closed.
        """
        if self._sync is not None:
            self._sync.leave()

    def state_dict(self) -> dict[str, Any]:
        """Returns the optimizer's state, and under ``"commhooks"`` this rank's residuals.

        Each rank saves its own.
        """
        state: dict[str, Any] = super().state_dict()  # type: ignore[misc]
        if self._sync is not None:
            state["commhooks"] = self._sync.state.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any], *, strict: bool = True) -> None:
        """Loads what ``state_dict`` gave.

        ``"commhooks"`` may be the list of all ranks of any world size. ``strict`` is that of
        ``SparseState.load_state_dict``.
        """
        state_dict = dict(state_dict)
        residuals = state_dict.pop("commhooks", None)
        groups, state = self.param_groups, self.state
        super().load_state_dict(state_dict)  # type: ignore[misc]
        # The wrapped optimizer, on which a scheduler may have been made, shares these objects.
        for group, loaded in zip(groups, self.param_groups, strict=True):
            group.clear()
            group.update(loaded)
        loaded_state = dict(self.state)
        state.clear()
        state.update(loaded_state)
        self.param_groups, self.state = groups, state
        if self._sync is not None:
            self._sync.reset()
            if residuals is not None:
                self._sync.open()
                self._sync.state.load_state_dict(residuals, strict=strict)
        self._synchronized, self._should_synchronize = False, True

    def __getstate__(self) -> Any:
        raise TypeError("a distributed optimizer is not pickled or copied: use state_dict()")


@says_what_to_write
def DistributedOptimizer(  # noqa: N802  (Horovod's name)
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, Tensor]] | None = None,
    state: SparseState | None = None,
    compression: Any = None,
    backward_passes_per_step: int = 1,
    op: Any = None,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: Any = None,
    sparse_as_dense: bool = False,
    process_set: Any = None,
    *,
    bucket_cap_mb: float = 25.0,
) -> Any:
    """Wraps an optimizer: gradients are averaged sparsely over Horovod's ranks before ``step()``.

    Gradients are copied into fused buckets of a fixed order. The state's thread exchanges each full bucket
    while backward goes on. The exchange runs beside Horovod: over MPI when MPI started the job, else over a
    gloo group that is opened here. This is a collective call of the process set. Under an elastic launcher
    the first exchange is, instead.

    Example:
        >>> state = SparseState.gtopk(0.001)
        >>> optimizer = DistributedOptimizer(optimizer, model.named_parameters(), state=state)

    Args:
        optimizer: any ``torch.optim.Optimizer``. The result shares its parameter groups and its state.
        named_parameters: the model's. The names appear in ``state_dict`` and messages. None: numbered names.
        state: scheme and memory, one for each optimizer. The launcher decides between MPI and gloo.
        compression: must be None (or ``hvd.Compression.none``): the state is the compression.
        backward_passes_per_step: gradients accumulate locally (as a sum) over so many backward passes.
        op: ``hvd.Average`` (default) or ``hvd.Sum``.
        gradient_predivide_factor: must be 1: the average is divided once, in float32.
        num_groups: deprecated by Horovod, and the same as ``groups``.
        groups: a number of buckets, or a list of lists of parameters, each a bucket, exchanged in this order.
        sparse_as_dense: accept sparse gradients (``nn.Embedding(sparse=True)``). They come back sparse.
        process_set: ranks that take part. On other ranks ``step()`` stays local.
        bucket_cap_mb: largest bucket in MiB.

    Returns:
        An instance of a subclass of the optimizer's class with ``synchronize()``, ``skip_synchronize()``,
        ``set_backward_passes_per_step()`` and ``sparse_state``. ``hvd.broadcast_optimizer_state`` and
        ``hvd.elastic.TorchState`` take it.

    Raises:
        ValueError: an option that is not supported, or a bad value. The message names it.
        TypeError: ``optimizer`` or ``state`` is of another type.
        RuntimeError: Horovod is not 0.28.x.
    """
    hvd = horovod()
    require_version()
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if not isinstance(state, SparseState):
        raise TypeError(f"state must be a SparseState, got {type(state).__name__}")
    _check_options(hvd, compression, op, gradient_predivide_factor, num_groups, groups)
    _check_passes(backward_passes_per_step)
    process_set = check_process_set(process_set)
    names = _names(optimizer, named_parameters)
    memory = state.reducer.memory
    check_optimizer(memory, state.reducer.selector, optimizer, state.reducer.aggregator)
    if memory.decays and op == hvd.Sum:
        raise ValueError(
            f"op must be hvd.Average with weight decay in the memory, got {op!r}: a sum would have one L2 "
            "term of every rank"
        )
    wrapped = _wrap(optimizer)
    if isinstance(memory, ErrorFeedback):
        memory.optimizer_was_wrapped(optimizer, wrapped)
    wrapped._sync = None
    if process_set.included():
        trained = [p for p in names if p.requires_grad]
        only_sparse = isinstance(optimizer, torch.optim.SparseAdam)
        wrapped._sync = GradientSync(
            state,
            partition(trained, bucket_cap_mb, groups if groups is not None else (num_groups or None)),
            names,
            passes=backward_passes_per_step,
            sums=op == hvd.Sum,
            process_set=process_set,
            sparse="refused" if not sparse_as_dense else "only" if only_sparse else "taken",
        )
    return wrapped


def _wrap(optimizer: torch.optim.Optimizer) -> Any:
    """Makes an instance of a subclass of the optimizer's own class that shares all its attributes.

    ``hvd.broadcast_optimizer_state`` recognises Horovod's optimizers by their ``__module__``. It then
    initialises the state by the parent class's ``step``, without communication. So our class has the same
    ``__module__``.
    """
    base = type(optimizer)

    def step(self: Any, closure: Callable[[], Any] | None = None) -> Any:
        """Averages the gradients unless told not to, then takes the optimizer's own step."""
        if self._should_synchronize:
            if self._synchronized:
                warnings.warn(
                    "step() after synchronize() averages again: wrap it in `with "
                    "optimizer.skip_synchronize():`",
                    stacklevel=callers_level(),
                )
            self.synchronize()
        self._synchronized = False
        return base.step(self, closure)

    members = {"step": step, "__module__": "horovod.torch.optimizer", "__doc__": base.__doc__}
    wrapped: Any = object.__new__(type(base.__name__, (SparseOptimizer, base), members))
    # An LR scheduler may have replaced the instance's step. That one would bypass ours.
    wrapped.__dict__ = {name: value for name, value in optimizer.__dict__.items() if name != "step"}
    return wrapped


def _names(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, Tensor]] | None
) -> dict[Tensor, str]:
    """Names of the optimizer's parameters, in the order of ``named_parameters``."""
    ours = [p for group in optimizer.param_groups for p in group["params"]]
    if named_parameters is None:
        return {p: f"noname.{i}" for i, p in enumerate(ours)}
    pairs = check_named(named_parameters)
    wanted = {id(p) for p in ours}
    missing = wanted - {id(p) for _, p in pairs}
    if missing:
        raise ValueError(f"named_parameters lacks {len(missing)} of the optimizer's {len(wanted)} parameters")
    return {p: name for name, p in pairs if id(p) in wanted}


def _check_options(
    hvd: Any, compression: Any, op: Any, gradient_predivide_factor: float, num_groups: int, groups: Any
) -> None:
    if compression is not None and compression is not hvd.Compression.none:
        raise ValueError(f"compression must be None: state= is the compression, got {compression!r}")
    if op is not None and op == hvd.Adasum:
        raise ValueError(
            "op=Adasum is not supported: a sparse sum has no Adasum. Use op=hvd.Average or hvd.Sum"
        )
    if op is not None and op not in (hvd.Average, hvd.Sum):
        raise ValueError(f"op must be hvd.Average or hvd.Sum, got {op!r}")
    if gradient_predivide_factor != 1.0:
        raise ValueError(
            f"gradient_predivide_factor must be 1, got {gradient_predivide_factor!r}: sums are formed in "
            "float32 and divided once, so there is nothing to gain in range"
        )
    if num_groups < 0:
        raise ValueError(f"num_groups must not be negative, got {num_groups!r}")
    if groups is not None and not isinstance(groups, (int, list, tuple)):
        raise ValueError(f"groups must be a number or a list of lists of parameters, got {groups!r}")


def _check_passes(passes: int) -> None:
    if not isinstance(passes, int) or passes < 1:
        raise ValueError(f"backward_passes_per_step must be a positive integer, got {passes!r}")
