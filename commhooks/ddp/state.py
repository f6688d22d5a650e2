"""``SparseState``: the state that DDP passes to the hook with every bucket."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from ..errors import says_what_to_write
from ..exchange import Aggregator, Dense, LowBit
from ..gradient.bucket import Bucket
from ..gradient.side_stream import drain, ready_event, stream_after
from ..memory import Memory
from ..memory.clipping import norm_of
from ..memory.no_memory import NoMemory
from ..memory.resharding import check_entries
from ..memory.single_user import claim
from ..reduction.checkpoint import check_units
from ..reduction.reducer import Reducer
from ..schemes import UNSET, dense_memory, make_parts
from ..selection.density import DensitySchedule
from ..selection.selectors import Selector
from ..transports import OVER_TORCH, Transport
from ..transports.distributed import backend_for
from .comm_thread import CommThread
from .optimizers import check_optimizer, is_plain_sgd
from .recipe import Recipe, check_moved
from .step_watch import Found, StepWatch
from .wrapped import check_group, find_ddp

if TYPE_CHECKING:
    from ..planner import Plan

logger = logging.getLogger(__name__)


class SparseState:
    """Averages the gradients of one DDP model by a selector, an aggregator and a memory, on its own thread.

    Example:
        >>> state = SparseState(TopK(density=0.001), GTopK(), ErrorFeedback(momentum=0.9))
        >>> commhooks.register(ddp_model, state, optimizer)

    Args:
        selector: chooses the elements of a gradient that are sent. None only with ``Dense`` and ``LowBit``.
        aggregator: sums the ranks' selections, over the transport that it names.
        memory: keeps what is not sent. Default: ``NoMemory()`` with ``Dense``, else ``ErrorFeedback()``.
        nonfinite: ``"propagate"``, ``"skip"`` or ``"error"``: see :class:`Reducer`.
        grad_scaler: the job's ``GradScaler``. The memory is then kept in unscaled units, and a change of the
            loss scale does not affect it. Without a scaler here, a change weighs what is in the memory by old
            over new scale.
        dense_crossover: whether to send a bucket densely when that takes fewer bytes, or a rule: see
            :class:`Reducer`.
        delta_every: measure delta (:class:`Reducer`) every so many steps. 0: never.
        timeout_s: seconds until a missing rank is an error. None: the process group's timeout, or 300 s
            without a group.
        process_group: whose ranks take part, for the ``"distributed"`` transport. :func:`register` sets it to
            DDP's group. With ``register_comm_hook`` it must be named in a job that has groups of fewer ranks.
        ddp_allreduce: leave the average to DDP's own all-reduce, which is faster than a dense exchange by
            this state's thread. Traffic is not counted then. Only with ``Dense("distributed")``,
            ``NoMemory()`` and ``"propagate"``, and not ``undoable``.
        undoable: keep the memory from before each step, so that :meth:`discard` can restore it. It takes as
            much memory again as residuals and velocities.

    Attributes:
        reducer: runs the pipeline for each bucket.
        error: the error that made the state fail, or None. A failed state raises it at every later step.
        plan: the decision of :meth:`auto`, or None.
        moved: the optimizer's settings that :meth:`for_optimizer` put into the memory, or None.
        watch: observes whether the averages are used, zeroed, clipped or accumulated.
        passed: buckets that the hook returned as they were since the last :meth:`passthrough` began.

    Raises:
        TypeError, ValueError: an argument of a wrong kind or value, ``nonfinite="skip"`` with a
            ``grad_scaler``, or ``ddp_allreduce`` with settings that DDP cannot serve.
    """

    _owner: weakref.ref[Any] | None
    error: BaseException | None
    moved: dict[str, object] | None = None
    _waiting: list[_FilledBucket]

    @says_what_to_write
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
        timeout_s: float | None = None,
        process_group: Any = None,
        ddp_allreduce: bool = False,
        undoable: bool = False,
    ) -> None:
        if grad_scaler is not None and not hasattr(grad_scaler, "get_scale"):
            raise TypeError(f"grad_scaler must be a GradScaler, got {type(grad_scaler).__name__}")
        if nonfinite == "skip" and grad_scaler is not None and grad_scaler.is_enabled():
            raise ValueError(
                "nonfinite='skip' does not go with a grad_scaler: the scaler would never see NaN or Inf and "
                "never lower its scale. Write nonfinite='propagate': the scaler then skips the step"
            )
        self.reducer = Reducer(
            selector,
            aggregator,
            memory,
            nonfinite=nonfinite,
            dense_crossover=dense_crossover,
            delta_every=delta_every,
            timeout_s=timeout_s,
            undoable=undoable,
        )
        claim(self.reducer, self, "reducer", "averager or state")
        self.grad_scaler, self.process_group = grad_scaler, process_group
        self.ddp_allreduce = bool(ddp_allreduce)
        if ddp_allreduce and not self._ddp_can():
            raise ValueError(
                "ddp_allreduce=True leaves the average to DDP, which can only sum what it is given over its "
                'own group: it goes with Dense("distributed"), NoMemory(), nonfinite="propagate" and '
                "undoable=False, got "
                f"{self.reducer.settings()}, transport {self.reducer.connection.requested!r}"
            )
        if self.reducer.connection.requested == "mpi":
            from ..transports.mpi import load_mpi

            load_mpi()  # MPI_Init belongs to the main thread. The first bucket comes on another one
        self.plan: Plan | None = None
        self._reset_runtime()

    @classmethod
    @says_what_to_write
    def for_optimizer(
        cls,
        optimizer: torch.optim.Optimizer,
        density: float = 0.01,
        transport: str | Transport = "distributed",
        *,
        warmup_steps: int | None = None,
        scheme: str | None = None,
        clip_norm: float | None = None,
        norm_over: str = "bucket",
        factor_masking: bool | None = None,
        rescale_with_lr: bool = False,
        **options: Any,
    ) -> SparseState:
        """Makes the state that goes with an optimizer, and tells on rank 0 in one line what it did.

        Of ``torch.optim.SGD`` it takes momentum, ``nesterov`` and weight decay into the memory and sets the
        optimizer's to 0, so that they act on what each rank computes and not on what arrives. A step of the
        optimizer raises ``ValueError`` when one of them is set again, as ``OneCycleLR`` does with the
        momentum unless ``cycle_momentum=False``. Weight decay may differ between the parameter groups. Other
        optimizers stay as they are, and every element is sent in 4 bits. For those with a second moment the
        line names averaging, which sends less.

        Call it before the optimizer loads a checkpoint of a run with such a state.

        Args:
            optimizer: the job's optimizer.
            density: k/n in (0, 1] after the warm-up.
            transport: ``"distributed"``, ``"mpi"`` or a ``Transport``.
            warmup_steps: steps over which the density falls from 0.25 to ``density``. 0: none. It must be
                given, except with ``"lowbit"``, which has no density.
            scheme: a name of ``commhooks.schemes.SCHEMES`` except ``"dense"``. None: ``"topk"`` for
                ``torch.optim.SGD``, and for all others ``"lowbit"``, which has no density.
            clip_norm: largest norm of this rank's gradient, before the memory.
            norm_over: the norm of each ``"bucket"``, or of the whole ``"model"``: see ``ErrorFeedback``.
            factor_masking: whether the velocity is set to zero where a value was sent. None: without a
                warm-up only. docs/recipes.md has both ways, measured, and the rates that they take.
            rescale_with_lr: whether what is withheld keeps the learning rate of its own step: see
                ``ErrorFeedback``.
            options: further arguments of this class except ``memory``.

        Raises:
            TypeError: ``optimizer`` is no torch optimizer, ``memory`` is given, or ``warmup_steps`` is
                missing.
            ValueError: a number out of range, or settings of the optimizer that a memory cannot have:
                momentum that differs between the groups, dampening, ``maximize`` with weight decay, random-k
                with momentum.
        """
        if "memory" in options:
            raise TypeError(
                "for_optimizer() makes the memory: write SparseState.topk(..., memory=...) instead"
            )
        clip = None if clip_norm is None else (clip_norm, norm_over)
        recipe = Recipe(
            optimizer,
            density,
            warmup_steps=warmup_steps,
            scheme=scheme,
            clip=clip,
            factor_masking=factor_masking,
            rescale_with_lr=rescale_with_lr,
        )
        state = cls._of(recipe.scheme, recipe.density, transport, memory=recipe.memory, **options)
        state.moved = recipe.apply()
        return state

    @classmethod
    @says_what_to_write
    def topk(
        cls, density: float | DensitySchedule, transport: str | Transport = "distributed", **options: Any
    ) -> SparseState:
        """Makes a state that all-gathers every rank's exact top-k, with error feedback.

        Args:
            density: k/n in (0, 1], or a schedule.
            transport: ``"distributed"``, ``"mpi"`` or a ``Transport``.
            options: further arguments of this class, such as ``memory``.
        """
        return cls._of("topk", density, transport, **options)

    @classmethod
    @says_what_to_write
    def gtopk(
        cls, density: float | DensitySchedule, transport: str | Transport = "distributed", **options: Any
    ) -> SparseState:
        """Makes a state of global top-k by recursive doubling, with error feedback.

        Arguments as :meth:`topk`.
        """
        return cls._of("gtopk", density, transport, **options)

    @classmethod
    @says_what_to_write
    def randomk(
        cls,
        density: float | DensitySchedule,
        transport: str | Transport = "distributed",
        *,
        seed: int = 0,
        **options: Any,
    ) -> SparseState:
        """Makes a state that all-reduces k random elements, the same on all ranks, with error feedback.

        ``seed`` is that of the random masks. Further arguments as :meth:`topk`.
        """
        return cls._of("randomk", density, transport, seed, **options)

    @classmethod
    @says_what_to_write
    def dense(cls, transport: str | Transport = "distributed", **options: Any) -> SparseState:
        """Makes a state that all-reduces everything in float32: the baseline on the same transport."""
        return cls._of("dense", None, transport, **options)

    @classmethod
    @says_what_to_write
    def lowbit(cls, bits: int = 4, transport: str | Transport = "distributed", **options: Any) -> SparseState:
        """Makes a state that sends every element in ``bits`` bits (16, 8, 4 or 2), with error feedback.

        It is for optimizers that need every element's gradient at every step, such as AdamW. Both roundings
        of :class:`~commhooks.LowBit` are remembered. Further arguments as :meth:`topk`.
        """
        return cls(None, LowBit(bits, transport), **options)

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
        """Makes a state of a named scheme."""
        selector, aggregator, _ = make_parts(scheme, density, transport, seed=seed)
        return cls(selector, aggregator, memory, **options)

    @classmethod
    @says_what_to_write
    def auto(
        cls,
        model: torch.nn.Module | int,
        transport: str | Transport = "distributed",
        *,
        optimizer: torch.optim.Optimizer | None = None,
        densities: Sequence[float] = (0.01,),
        backward_s: float = 0.0,
        device: torch.device | str | None = None,
        probe_timeout_s: float = 60.0,
        **options: Any,
    ) -> SparseState:
        """Measures network and device and makes the state that the cost model advises. A collective call.

        All ranks choose the same. Rank 0 prints the choice as one line on stderr (or logs it), and
        :attr:`plan` holds it. Where measurements disagree, the choice is the one closest to dense training.
        Buckets for which the chosen exchange would be slower are sent densely.

        Args:
            model: the module, or its number of parameters. For a DDP model the plan keeps the model's bucket
                cap and measures over its process group.
            transport: ``"distributed"``, ``"mpi"`` or a ``Transport``.
            optimizer: the job's optimizer. Random-k diverges with momentum, so it is considered only when
                this is an SGD without momentum. For another optimizer than SGD gradients in 8 and 4 bits
                (:meth:`lowbit`) are considered, and not sparse ones, which cost AdamW much of the loss.
            densities: values of k/n to choose from.
            backward_s: seconds of one backward, which hides communication. The slowest rank's counts. 0:
                unknown.
            device: where gradients live. Default: the model's device, or the CPU for a number.
            probe_timeout_s: seconds until a rank that is missing at the measurement is an error.
            options: further arguments of this class. With a dense plan a ``memory`` is kept only where it has
                momentum or clipping, or is of a class of your own.

        Returns:
            A state whose attribute ``plan`` says what was chosen and why, with the ``bucket_cap_mb`` to give
            DDP.

        Raises:
            ValueError: ``model`` has no parameters, a density or a time is out of range, or the memory has
                momentum under an optimizer with a second moment.
        """
        from ..planner import ADAPTIVE, BUCKET_MB, SAFE, Job, plan_for, sizes_of  # importing stays quick

        caps: tuple[float, ...] = BUCKET_MB
        ddp, memory = find_ddp(model), options.get("memory")
        if ddp is not None:
            caps = (ddp.bucket_bytes_cap / (1 << 20),)
            options.setdefault("process_group", ddp.process_group)
        if device is None:
            device = next(model.parameters()).device if isinstance(model, torch.nn.Module) else "cpu"
        check_optimizer(memory, None, optimizer)
        schemes = (*SAFE, "randomk") if is_plain_sgd(optimizer, memory) else SAFE
        if optimizer is not None and not isinstance(optimizer, torch.optim.SGD):
            schemes = ADAPTIVE
        job = Job(*sizes_of(model), backward_s, tuple(densities), schemes, caps)
        group = options.get("process_group")
        plan = plan_for(transport, job, device=device, timeout_s=probe_timeout_s, process_group=group)
        if plan.scheme == "dense":
            state = cls._of("dense", None, transport, **{**options, "memory": dense_memory(memory)})
            state.ddp_allreduce = state._ddp_can()
        elif plan.bits is not None:
            state = cls.lowbit(plan.bits, transport, **{"dense_crossover": plan, **options})
        else:
            state = cls._of(plan.scheme, plan.density, transport, **{"dense_crossover": plan, **options})
        state.plan = plan
        return state

    def submit(
        self, buffer: Tensor, index: int, parameters: tuple[Hashable, ...], is_last: bool
    ) -> Future[Tensor]:
        """Queues one bucket and returns at once.

        Args:
            buffer: shape ``(n,)``, the bucket's gradient, overwritten with the average over ranks.
            index: the bucket's number.
            parameters: the bucket's parameters, in the buffer's order.
            is_last: whether it is the step's last bucket.

        Returns:
            A future of ``buffer``. An error is raised where the future's value is used.
        """
        # Before take(), which begins to watch parameters that register() has not named.
        idle = self.watch.never_reached(parameters) if self.reducer.memory.decays else []
        found = self.watch.take(parameters, buffer, self._steps_all)
        devices: list[Any] = [buffer.device] if buffer.device.type == "cuda" else []
        done: Future[Tensor] = Future(devices=devices)
        if self._passthrough or self.error is not None:
            self.passed += 1
            done.set_result(buffer)
            return done.then(self._check)
        self._waiting.append(
            _FilledBucket(buffer, index, parameters, is_last, found, idle, ready_event(buffer), done)
        )
        if is_last or not self.reducer.memory.clips_model:
            full, self._waiting = self._waiting, []
            self._thread.submit(partial(self._run, full))
        return done.then(self._check)

    def _run(self, full: list[_FilledBucket]) -> None:
        """Reduces buckets on the state's own thread.

        Args:
            full: one bucket; or all of a step, where the memory clips by the norm of the whole model.
        """
        norm = self._step_norm(full) if self.reducer.memory.clips_model else None
        for one in full:
            try:
                with stream_after(one.ready, one.buffer):
                    self._reduce(one, norm)
                    # Set on this stream, so that users of the result wait for the work queued on it.
                    one.done.set_result(one.buffer)
            except BaseException as error:  # the device itself failed
                self._fail(error)
                one.done.set_result(one.buffer)

    def _step_norm(self, full: list[_FilledBucket]) -> Tensor | None:
        """Returns the norm of a whole step's gradients. An error is kept for :meth:`raise_error`."""
        if self.error is not None:
            return None
        one_device, norms = len({one.buffer.device for one in full}) == 1, []
        try:
            for one in full:
                with stream_after(one.ready, one.buffer):
                    norm = norm_of(self._enter(one).buffer)
                    norms.append(norm if one_device else norm.cpu())
            with stream_after(full[-1].ready, full[-1].buffer):
                return norm_of(torch.stack(norms))
        except BaseException as error:
            self._fail(error)
            return None

    def _enter(self, one: _FilledBucket) -> Bucket:
        """Makes the bucket at the first call, and takes out of it what is no gradient of this pass."""
        if one.bucket is None:
            found, unreached = one.found, frozenset[int]()
            if not self._steps_all:
                unreached = frozenset((*found.stale, *one.idle))
            bucket = self._bucket(one.buffer, one.index, one.parameters, one.is_last, unreached)
            one.bucket = replace(bucket, same_step=found.same_step)
            one.kept = bucket.take_out(found.stale, found.held)
        return one.bucket

    def _reduce(self, one: _FilledBucket, norm: Tensor | None) -> None:
        """Reduces one bucket. An error is kept for :meth:`raise_error`."""
        if self.error is not None:
            return
        try:
            bucket = self._enter(one)
            if norm is not None:
                bucket = replace(bucket, step_norm=norm)
            scale = self._loss_scale()
            self.reducer.reduce(bucket, scale)
            bucket.put_back(one.kept, one.found.held)
            self.watch.written(one.found, one.buffer)
            if bucket.is_last:
                bad = bool(self.reducer.nonfinite_buckets)
                self.watch.end_step(bad)
                if self.reducer.selector is not None and self.reducer.remembers and not bad:
                    self.watch.remember_largest(bucket, scale)
        except BaseException as error:
            self._fail(error)
            drain(one.buffer.device, _DRAIN_S)

    def forget_waiting(self) -> None:
        """Gives buckets that wait for their step's last one back as they are. They are in no memory yet."""
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            self._indices.discard(one.index)
            one.done.set_result(one.buffer)

    def set_names(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Sets the parameters' names, for ``state_dict`` and messages. :func:`register` calls it."""
        named = list(named_parameters)
        self.reducer.memory.table.names.update({p: name for name, p in named})
        for name, parameter in named:
            if parameter.requires_grad and parameter.is_leaf:
                self.watch.add(parameter, name)

    def attach(self, owner: Any, average: bool = True, steps_all: bool = False) -> None:
        """Binds the state to one model. A model that was wrapped anew may take the place of the former one.

        Args:
            owner: the model, held weakly.
            average: whether its gradients become the average over ranks, or their sum.
            steps_all: whether the optimizer steps with parameters, too, that no backward pass reached, as
                under Horovod. Such parameters then have weight decay; under DDP they have none.

        Raises:
            ValueError: the state belongs to another model already.
        """
        former = None if self._owner is None else self._owner()
        if former is not None and former is not owner and not _wrap_same_module(former, owner):
            raise ValueError("this SparseState has a model already; each DDP model needs a state of its own")
        if former is not owner:
            self._steps_seen = 0  # its parameters may be others: some may have been unfrozen
        # Weakly: DDP's C++ part holds this state, and a cycle through C++ would never be collected.
        self._owner = weakref.ref(owner)
        self.reducer.set_average(average)
        self._steps_all = steps_all

    def open(self, device_type: str | None = None, *, given: tuple[Transport, Any] | None = None) -> None:
        """Opens the transport if it is not open yet. A collective call, which the first bucket makes too.

        Args:
            device_type: where gradients live. None: ``"cuda"`` when the process group runs NCCL, else
                ``"cpu"``.
            given: an open transport, which is taken instead and closed by :meth:`close`, and its process
                group or None.

        Raises:
            ValueError: the world sizes of transport and process group differ, or no process group was named
                and this rank is in several.
        """
        if given is not None:
            transport, self.process_group = given
            self.reducer.connection.adopt(transport)
            return
        check_group(self.process_group, self.reducer.connection)
        if device_type is None:
            nccl = dist.is_available() and backend_for(self.process_group, "cuda") == "nccl"
            device_type = "cuda" if nccl else "cpu"
        self.reducer.open(self.process_group, device_type)
        if dist.is_available() and dist.is_initialized():
            expected = dist.get_world_size(self.process_group)
            actual = self.reducer.transport.world_size
            if actual != expected:
                raise ValueError(
                    f"the transport connects {actual} ranks and DDP's process group {expected}: start the "
                    "job by the mpiexec of the MPI library that mpi4py uses"
                )

    @contextmanager
    def passthrough(self) -> Iterator[None]:
        """Makes the hook return each rank's own gradient inside this context. Nothing is sent or kept.

        With ``ddp_allreduce`` a model that :func:`register` got has no hook, and DDP averages here too.
        """
        self._passthrough, self.watch.enabled, self.passed = True, False, 0
        try:
            yield
        finally:
            self._passthrough, self.watch.enabled = False, True

    def discard(self) -> None:
        """Undoes the last backward pass: memory, step number and schedules are as before it, bit for bit.

        Use it for a step that is skipped because its gradient norm is too large, for SAM's first pass, or for
        a learning-rate finder, and call ``zero_grad()`` afterwards. It is not collective, but all ranks must
        discard the same pass. If only some do, the next step raises ``SettingsMismatchError``.

        Raises:
            RuntimeError: the state is not ``undoable``, or there is nothing to discard: the last pass was
                discarded already, or the one since the optimizer's step sent nothing, as inside
                ``no_sync()``.
        """
        self._thread.wait()
        self.raise_error()
        if not self._steps_all and self.watch.holds_back:
            raise RuntimeError(
                "discard(): the last backward pass sent nothing, as inside no_sync(), so zero_grad() alone "
                "discards it. discard() would undo the pass before, with which an optimizer has stepped"
            )
        self.reducer.discard()
        if not self.watch.accumulates:  # else averages of the step's earlier passes must not be zeroed
            self.watch.forgive()

    def reset(self) -> None:
        """Sets the memory to zero and starts at step 0. It is not collective.

        All ranks must call it between the same steps. If only some do, the next step raises
        ``SettingsMismatchError``. A step that was begun, by a backward pass that raised, is forgotten.
        """
        self.forget_waiting()
        self._thread.wait()
        self._indices.clear()
        self.reducer.reset()
        self.watch.forgive()

    def raise_error(self) -> None:
        """Raises the error that made the state fail, if it has failed."""
        if self.error is not None:
            raise self.error

    def stats(self) -> dict[str, Any]:
        """Returns figures of the last step: bytes sent and received, ratio, residual norm, delta, seconds.

        ``"averaged_by"`` is ``"commhooks"``, or ``"ddp"`` where DDP's own all-reduce averages. All other
        figures are None then, because nothing is counted.
        """
        figures = self.reducer.stats()
        if self.ddp_allreduce:
            return {"averaged_by": "ddp", **dict.fromkeys(figures)}
        return {"averaged_by": "commhooks", **figures}

    def state_dict(self) -> dict[str, Any]:
        """Returns this rank's residuals and velocities by parameter name. Save one per rank, between steps.

        ``"scheme"`` says what made them, and ``"units"`` whether they are of unscaled gradients
        (``grad_scaler``). ``"moved"`` has the settings that :meth:`for_optimizer` moved, by name.

        Waits for the buckets under way. Inside a backward pass, and between it and the step of a torch
        optimizer that has stepped before, an ``undoable`` state returns the memory from before the pass.

        Raises:
            ValueError: the parameters' names are unknown.
            RuntimeError: it is called there, and the state is not ``undoable``, or several backward passes
                belong to the optimizer's step.
        """
        self._thread.wait()
        used = not self.watch.are_unused(self.reducer.memory.table.names)
        if self.watch.accumulates and (self.reducer.is_inside or not used):
            raise RuntimeError(
                "state_dict() after several backward passes of one optimizer step, of which only the last "
                "could be taken back: call it after the optimizer's step"
            )
        moved = {} if self.moved is None else {"moved": dict(self.moved)}
        return {**self.reducer.state_dict(last_counts=used), "units": self._units, **moved}

    @property
    def _units(self) -> str:
        """The units of the memory. Without a scaler they are those of the gradients that DDP gives."""
        return "as given" if self.grad_scaler is None else "unscaled"

    def load_state_dict(self, state: dict[str, Any] | list[dict[str, Any]], *, strict: bool = True) -> None:
        """Loads this rank's state, or the list of all ranks' states of a run of any world size.

        The first call opens the transport, which is collective. All ranks must load between the same steps.
        If only some do, the next step raises ``SettingsMismatchError``. A step that was begun, by a backward
        pass that raised, is forgotten.

        Args:
            state: as for :meth:`Reducer.load_state_dict`.
            strict: False: a memory that does not fit is loaded all the same, and what is dropped is logged.

        Raises:
            ValueError: as :meth:`Reducer.load_state_dict`; the memory has other units, because only one of
                the two states has a ``grad_scaler``; or :meth:`for_optimizer` moved other settings.
        """
        for saved in state if isinstance(state, list) else [state]:
            check_entries(saved, ("residual", "velocity"))
            check_moved(saved, self.moved)
            check_units(saved, self._units, strict)
        self.forget_waiting()
        self._thread.wait()
        self.open()
        self.reducer.load_state_dict(state, strict=strict)
        self._steps_seen = 0
        self._indices.clear()
        self.watch.forgive()

    def restart(self, saved: dict[str, Any]) -> None:
        """Restores this rank's own ``state_dict()`` of this run, also after a failed step. Not collective.

        Everything that the failed step sent or kept is forgotten. Compute that step's gradients again.
        """
        self.forget_waiting()
        self._thread.wait()
        self._steps_seen = 0
        self._indices.clear()
        self.error = None
        self.reducer.restart(saved)
        self.watch.forgive()

    def close(self) -> None:
        """Joins the state's thread and closes the transport, without other ranks. The memory stays."""
        self._thread.close()
        self.reducer.connection.close()

    def __repr__(self) -> str:
        reducer, connection = self.reducer, self.reducer.connection
        over = f"transport {connection.requested!r}"
        if connection.is_open:
            over += f", rank {connection.transport.rank} of {connection.transport.world_size}"
        parts = f"{reducer.selector!r}, {reducer.aggregator!r}, {reducer.memory!r}"
        by_ddp = ", averaged by DDP's own all-reduce" if self.ddp_allreduce else ""
        failed = "" if self.error is None else f", failed: {type(self.error).__name__}: {self.error}"
        return f"{type(self).__name__}({parts}; {over}, step {reducer.step}{by_ddp}{failed})"

    @property
    def left_to_ddp(self) -> bool:
        """Whether DDP's all-reduce averages now, which needs ``ddp_allreduce`` and no :meth:`passthrough`."""
        return self.ddp_allreduce and not self._passthrough

    def _ddp_can(self) -> bool:
        """Whether DDP's all-reduce can serve this state's settings. NaN and Inf stay in its sum.

        It counts no steps, so none can be discarded.
        """
        reducer = self.reducer
        plain = isinstance(reducer.aggregator, Dense) and isinstance(reducer.memory, NoMemory)
        in_sum = reducer.nonfinite == "propagate" and not reducer.undoable
        return plain and in_sum and reducer.connection.requested in OVER_TORCH

    def __getstate__(self) -> dict[str, Any]:
        state = {k: v for k, v in self.__dict__.items() if k not in _RUNTIME}
        return {**state, "saved": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        saved = state.pop("saved")
        self.__dict__.update(state)
        claim(self.reducer, self, "reducer", "averager or state")
        self.process_group = self.grad_scaler = None
        self._reset_runtime()
        self._lacks_scaler = saved.get("units") == "unscaled"
        self.reducer.restart(saved)

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseState:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(deepcopy(self.__getstate__(), memo))
        copied.grad_scaler = self.grad_scaler  # the job has one
        return copied

    def _reset_runtime(self) -> None:
        self.error = None
        self._thread = CommThread("commhooks")
        self.watch = StepWatch()
        self._owner = None
        self._passthrough, self.passed = False, 0
        self._steps_seen = 0
        self._indices: set[int] = set()
        self._waiting = []
        self._steps_all = self._lacks_scaler = False

    def _bucket(
        self,
        buffer: Tensor,
        index: int,
        parameters: tuple[Hashable, ...],
        is_last: bool,
        unreached: frozenset[int],
    ) -> Bucket:
        """Makes the bucket and checks that it is of this state's model.

        Raises:
            ValueError: it is of another model, or came twice in one step.
            TypeError: its gradient is not dense float32, bfloat16 or float16.
        """
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
            # The buffer does not show it: DDP fills it with the real and imaginary parts.
            if isinstance(p, Tensor) and p.is_complex():
                raise TypeError(
                    f"bucket {index}: gradients must be dense float32, bfloat16 or float16, got {p.dtype} "
                    f"({table.name_of(p)})"
                )
        numels = tuple(p.numel() for p in parameters if isinstance(p, Tensor))
        if not self.reducer.connection.is_open:
            self.open(buffer.device.type)
        return Bucket(index, buffer, parameters, numels, is_last, unreached, in_memory_order=True)

    def _loss_scale(self) -> float:
        """Returns this step's loss scale. Called on the state's thread, since reading it may wait."""
        if self.grad_scaler is None and self._lacks_scaler:
            raise ValueError(
                "this state was pickled with a grad_scaler, which is not in the file: set state.grad_scaler "
                "= scaler, or GradScaler(enabled=False) where the loss is not scaled now"
            )
        if self.grad_scaler is None or not self.grad_scaler.is_enabled():
            return 1.0
        return float(self.grad_scaler.get_scale())

    def _fail(self, error: BaseException) -> None:
        self.error = error
        logger.error("communication failed: %s: %s", type(error).__name__, error)
        if self.reducer.connection.is_open:
            self.reducer.transport.fail(error)

    def _check(self, done: Future[Tensor]) -> Tensor:
        self.raise_error()
        return done.value()


def _wrap_same_module(a: Any, b: Any) -> bool:
    """Whether two DDP models wrap the same module."""
    return a.__dict__.get("_modules", {}).get("module", a) is b.__dict__.get("_modules", {}).get("module", b)


@dataclass(eq=False, slots=True)
class _FilledBucket:
    """A bucket that DDP has filled.

    Attributes:
        found: what in the buffer is no gradient of its backward pass.
        idle: positions of parameters that no backward pass has reached yet.
        ready: the event after which the buffer is full; None on the CPU.
        done: the future that DDP waits for.
        bucket, kept: once it was taken into the step: the bucket, and what ``take_out`` returned.
    """

    buffer: Tensor
    index: int
    parameters: tuple[Hashable, ...]
    is_last: bool
    found: Found
    idle: list[int]
    ready: Any
    done: Future[Tensor]
    bucket: Bucket | None = None
    kept: dict[int, Tensor] = field(default_factory=dict)


_DRAIN_S = 5.0
"""Seconds for which a failed bucket waits for its work on a GPU. A stalled NCCL kernel never ends."""

_RUNTIME = (
    "watch",
    "_thread",
    "_owner",
    "_passthrough",
    "passed",
    "_steps_seen",
    "_indices",
    "_waiting",
    "_steps_all",
    "_lacks_scaler",
    "process_group",
    "grad_scaler",
    "error",
)
