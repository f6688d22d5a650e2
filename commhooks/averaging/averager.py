"""Base of all averagers: the step count, which tensors take part, agreement between ranks, state."""

from __future__ import annotations

import copy
import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.model_averaging.averagers import ModelAverager
from torch.utils.hooks import RemovableHandle

from ..errors import NonFiniteGradientError
from ..exchange import LowBit
from ..memory.single_user import claim
from ..reduction.checkpoint import complain, withheld
from ..reduction.step import check_nonfinite
from ..transports import Transport
from . import watch
from .agreement import Gather, Header, Ranks, agree
from .buffers import BufferChoice, Buffers, average_exactly, has_nonfinite
from .channel import TAG, Channel, reporting
from .flat import (
    Parameters,
    digest,
    digest_of,
    flatten,
    message_dtype,
    shown_layout,
    tensors_of,
    trainable,
    unflatten_,
)
from .members import Members
from .stats import Figures
from .sync_sets import Every, Period, as_sync_set

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..reduction.reducer import Reducer

logger = logging.getLogger(__name__)


class AveragerOptions(TypedDict, total=False):
    """The options that every averager takes. :class:`Averager` says what they mean."""

    transport: str | Transport
    module: torch.nn.Module | None
    buffers: BufferChoice
    also: Parameters
    reducer: Reducer | None
    wire: LowBit | torch.dtype | None
    nonfinite: Literal["error", "skip", "propagate"] | None
    timeout_s: float | None
    process_group: dist.ProcessGroup | None
    device_type: str | None
    sync: Period  # the old name of period


_DEFAULTS: dict[str, Any] = {
    "transport": "distributed",
    "module": None,
    "buffers": "average",
    "also": None,
    "reducer": None,
    "wire": None,
    "nonfinite": None,
    "timeout_s": None,
    "process_group": None,
    "device_type": None,
}


class Averager(ModelAverager):
    """Base of the averagers, which average the ranks' models after some of the local optimizer steps.

    Call :meth:`average_parameters` once after every local optimizer step, on every rank. All averagers
    synchronise *after* the steps of their period: K, 2K, ... (torch's ``PeriodicModelAverager`` also does so
    at its very first call).

    Before each synchronisation the ranks compare a small header: settings, shapes, step, and which tensors
    take part. At the first synchronisation they also compare the starting point, where the averager knows it.
    So ranks that run different code, or different numbers of steps, end with
    :class:`~commhooks.errors.SettingsMismatchError`.

    A parameter takes part in three cases. It requires a gradient. Or it did so at the last averaging: a layer
    that was frozen since is averaged once more. Or it requires no gradient and has moved all the same.

    Args:
        period: local steps between averagings, a :class:`~commhooks.averaging.SyncSet`, or the steps
            themselves (from 1). ``sync=`` is its old name.
        known: the tensors to average. Empty: the first call of :meth:`average_parameters` gives them.
        transport: ``"distributed"``, ``"mpi"`` or a :class:`~commhooks.transports.base.Transport`.
        module: the model whose persistent buffers (BatchNorm statistics) are averaged or broadcast. None:
            buffers are left alone.
        buffers: ``"average"`` (default), ``"broadcast"`` (all become rank 0's) or ``"leave"``. The average
            is the mean over ranks, of floating buffers. Integers such as ``num_batches_tracked`` stay.
        also: further tensors to average at each synchronisation, uncompressed and without the algorithm's
            momentum: the teacher of a moving average, for instance.
        reducer: compresses what is sent. The model's change since the last synchronisation goes through it,
            with its memory, in place of the model. It belongs to this averager alone.
        wire: how the change is sent, such as ``LowBit(1)``, over the averager's own transport.
            ``torch.bfloat16`` is ``LowBit(16)``. What the wire does not send stays in the rank's own model,
            so the models differ after a synchronisation: ``common_model()`` has the one to evaluate and to
            save. For ``LocalSGD``, ``BlockMomentum``, ``SlowMo`` and ``DiLoCo``, without a reducer.
        nonfinite: what NaN or Inf in any rank's parameters does, alike on all ranks. ``"error"`` (default):
            ``NonFiniteGradientError`` on all ranks, before anything is averaged. ``"skip"``: those ranks are
            left out and take over the average of the others. With a reducer or a wire they count as not
            moved, and what they had withheld from the wire is lost with their models. So is what they keep as
            owners, where tensors freeze or join in the same synchronisation.
            ``"propagate"``: the average becomes NaN everywhere. None: ``"error"``, or with a reducer
            ``"propagate"``, so that the reducer's own policy decides. A buffer's element is averaged over the
            ranks where it is finite, unless the policy is ``"propagate"``.
        timeout_s: seconds until a stalled peer is an error, for a transport given by name. None: the process
            group's timeout, or 300 s without a group.
        process_group: whose ranks average, for ``"distributed"``. The transport makes a new group of these
            ranks. None: all ranks.
        device_type: the device that the transport sends from. ``"cuda"`` uses NCCL where the process group
            has it. None: the device of the parameters.

    Attributes:
        sync: the set of steps after which it synchronises.
        step: local steps so far (calls of :meth:`average_parameters`).
        synchronisations: averagings so far.

    Raises:
        TypeError: an option that does not exist, or a wire that is none.
        ValueError: an argument out of range, with its name and value. A reducer that another averager or
            state has. A wire for another averager, beside a reducer, or with a transport of its own.
    """

    local = False  # whether a rank exchanges messages with its neighbours only, not with all ranks
    _takes_wire: ClassVar[bool] = False
    _period_name: ClassVar[str] = "period"  # the argument's name, for settings()

    def __init__(
        self, period: Period | None, known: Sequence[Tensor] = (), **options: Unpack[AveragerOptions]
    ) -> None:
        # not super().__init__: it needs a torch.distributed group, which "mpi" and in_process do not have
        given: dict[str, Any] = {**_DEFAULTS, **options}
        self.sync = as_sync_set(period, given)
        policy = None if given["nonfinite"] is None else check_nonfinite(given["nonfinite"])
        self.module, self.buffers, self.reducer = given["module"], given["buffers"], given["reducer"]
        self._buffers = Buffers(self.module, self.buffers)
        self._also = [] if given["also"] is None else tensors_of(given["also"])
        message_dtype(self._also)  # raises where one cannot be averaged
        self.wire = LowBit(16) if given["wire"] is torch.bfloat16 else given["wire"]
        self._check_wire()
        self._nonfinite = policy or ("propagate" if self.reducer is not None else "error")
        self._leaves_out_nonfinite = policy != "propagate"  # see average_exactly(nonfinite=)
        self.process_group = given["process_group"]
        self._channel = Channel(
            given["transport"], given["timeout_s"], self.process_group, given["device_type"]
        )
        if self.reducer is not None:
            claim(self.reducer, self, "reducer", "averager or state")
        self.step = 0
        self.synchronisations = 0
        self._members = Members()
        self._members.see(known)
        self._figures = Figures()
        self._start = 0  # fingerprint of the starting point, to be compared; 0: unknown or done
        self._called = self._hooked = False
        self._shows_common = False  # inside common_model()
        self._fresh: bool = True  # whether the model should be where the averager left it
        self._watched = list(known) or ([] if self.module is None else list(self.module.parameters()))
        if self._watched or given["device_type"] is not None:
            self._channel.open_for(self._watched)
        watch.watch(self._watched, self)
        self._expect_steps()

    @property
    def transport(self) -> Transport:
        """The transport. The first use, a collective call, opens it unless the constructor did."""
        return self._channel.transport

    @property
    def rank(self) -> int:
        """This worker's rank."""
        return self.transport.rank

    @property
    def world_size(self) -> int:
        """Number of workers P."""
        return self.transport.world_size

    @property
    def period(self) -> int | None:
        """Local steps between averagings, or None where the set of steps has no period."""
        return self.sync.period if isinstance(self.sync, Every) else None

    def average_parameters(self, params: Parameters) -> None:
        """Counts one local step, and overwrites the parameters by their average after a step of the period.

        Args:
            params: the model's parameters or the optimizer's parameter groups, the same on every call and
                rank. Parameters whose ``grad`` is None take part.

        Raises:
            ValueError: ``params`` holds no tensor, as a generator that was used before does.
            NonFiniteGradientError: a rank's parameters hold NaN or Inf, and the policy is ``"error"``.
            PeerTimeoutError, PeerLostError: a peer is stalled or gone. The message names it and the step.
            SettingsMismatchError: ranks disagree on settings, shapes or the number of steps.
            RuntimeError: :meth:`hook` calls it already.
        """
        if self._hooked:
            raise RuntimeError(
                f"{type(self).__name__} is hooked to an optimizer, whose step calls it already"
            )
        self._count(params)

    def _count(self, params: Parameters) -> None:
        self._refuse_common_model("a local step")
        self.step += 1
        fresh, self._fresh = self._fresh, False
        if fresh:
            self._no_step_seen()
        due, starts = self.is_due(self.step), self.sync.starts_after(self.step)
        if due or starts or not self._called:
            self._called = True
            numbers = self._members.see(tensors_of(params))
            if due:
                self._synchronise(numbers)
            elif starts:
                self._start_from(numbers)

    def synchronise(self, params: Parameters) -> None:
        """Synchronises now, whatever the step: for instance after a last step that is not in the set."""
        self._refuse_common_model("synchronise()")
        self._synchronise(self._members.see(tensors_of(params)))

    def hook(self, optimizer: torch.optim.Optimizer) -> StepHook:
        """Calls :meth:`average_parameters` after every ``optimizer.step()`` from now on.

        A ``GradScaler`` that skips a step on one rank skips the call too, and the ranks' counts drift apart.
        With a ``GradScaler`` use :class:`~commhooks.averaging.AveragedOptimizer`.

        Returns:
            A handle. Its ``remove()``, or the end of its ``with`` block, ends the calls.

        Raises:
            RuntimeError: it is hooked already.
        """
        if self._hooked:
            raise RuntimeError(f"{type(self).__name__} is hooked to an optimizer already")
        self._hooked = True
        tell_parameters(self, optimizer.param_groups)
        handle = optimizer.register_step_post_hook(lambda opt, args, kwargs: self._count(opt.param_groups))
        return StepHook(handle, self._unhook)

    def _unhook(self) -> None:
        self._hooked = False

    def _refuse_common_model(self, call: str) -> None:
        """Raises where the parameters are not this rank's own model; see ``common_model()``."""
        if self._shows_common:
            raise RuntimeError(
                f"{call} inside {type(self).__name__}.common_model(): the parameters are not this rank's own "
                "model there, and its local steps would be lost"
            )

    def is_due(self, step: int) -> bool:
        """Whether to synchronise after local step ``step`` (from 1)."""
        return step in self.sync

    def settings(self) -> dict[str, object]:
        """Returns the settings that must be the same on all ranks, by name, as numbers and text."""
        plain = self.period is not None and self.sync == Every(self.period)
        period = {self._period_name: self.period if plain else repr(self.sync)}
        if self.wire is None:
            return {**period, "compressed": self.reducer is not None}
        return {**period, "wire": repr(self.wire)}

    def broadcast_parameters(self, params: Parameters, root: int = 0) -> None:
        """Makes all ranks start from rank ``root``'s parameters and persistent buffers, as DDP does.

        Frozen parameters are sent too. The averager forgets its momentum and the changes it withheld. This is
        a collective call.
        """
        self._refuse_common_model("broadcast_parameters()")
        given = tensors_of(params)
        numbers = self._members.see(given)
        with self._communicating(given):
            everything = [*given, *self._also, *self._buffers.persistent().values()]
            self._channel.broadcast(everything, root, f"{self._what()}, broadcast")
        self._start_from(numbers)

    def consensus_distance(self, params: Parameters) -> float:
        """Returns ``sqrt(mean_p ||x_p - mean x||^2)`` over the ranks' parameters, by two all-reduces."""
        tensors = trainable(params)
        with self._communicating(tensors):
            own = flatten(tensors, torch.float64)
            mean = self._channel.mean(own.clone(), "consensus distance")
            squared = self._channel.mean((own - mean).square().sum().reshape(1), "consensus distance")
        return float(torch.sqrt(squared))

    def stats(self) -> dict[str, Any]:
        """Returns figures of this rank so far.

        ``step`` and ``synchronisations`` are counts. ``bytes_sent``, ``bytes_received`` and ``seconds`` are
        those of all synchronisations, headers included. ``last_seconds`` is that of the last one.
        ``distance`` is the L2 norm of this rank's parameters minus the ranks' average, taken before the last
        synchronisation (None before the first).
        """
        return {
            "step": self.step,
            "synchronisations": self.synchronisations,
            **self._figures.as_dict(),
        }

    def close(self) -> None:
        """Closes the transport. It needs no other rank."""
        self._channel.close()

    def __repr__(self) -> str:
        place = f"rank {self.rank} of {self.world_size}, " if self._channel.is_open else ""
        done = f"step {self.step}, {self.synchronisations} synchronisations"
        return f"<{self._shown()}: {place}{done}>"

    def _shown(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in self.settings().items())})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Averager:
        """Returns a copy with tensors of its own, over the same transport. A reducer cannot be copied."""
        if self.reducer is not None:
            raise TypeError(f"{type(self).__name__} with a reducer cannot be copied: make another one")
        other = copy.copy(self)
        memo[id(self)] = other
        for name, value in vars(self).items():
            setattr(other, name, value if name == "process_group" else copy.deepcopy(value, memo))
        other._hooked = False  # the optimizer calls the original
        watch.watch(other._watched, other)
        return other

    # -- one synchronisation ---------------------------------------------------------------------------------

    def _synchronise(self, numbers: list[int]) -> None:
        self._check_members(numbers)
        with self._communicating([self._members.tensors[n] for n in numbers]):
            with self._figures.of(self._transports):
                ranks, part = self._agree(numbers)
                main, plain = self._divide(part)
                self._before_average(main)
                if main:
                    self._average(self._tensors(main), ranks)
                self._average_plainly([*self._with_state(self._tensors(plain)), *self._also], ranks)
                self._synchronise_buffers(ranks)
                self._members.averaged(part)
                self._averaged(part)
        self.synchronisations += 1
        self._expect_steps()
        logger.debug("%s: synchronised after step %d", type(self).__name__, self.step)

    def _agree(self, numbers: list[int], gather: Gather | None = None) -> tuple[Ranks, list[int]]:
        """Compares settings, shapes and step with the other ranks, and returns votes and who takes part."""
        part = self._members.taking_part(numbers)
        if not (part or self._also or self.synchronisations):
            raise ValueError("params must hold at least one parameter that requires a gradient, got none")
        moving = self._tensors(self._divide(part)[0])
        first = self.synchronisations == 0 and self.step > 0
        votes = self._nonfinite != "propagate"
        header = Header(
            settings=self._common(numbers, moving),
            start=self._starting_point(),
            part=digest(part),
            model=digest_of(moving) if first else 0,
            nonfinite=votes and _nonfinite([*self._with_state(self._tensors(part)), *self._also]),
            nonfinite_buffers=has_nonfinite(self._buffers.averaged()),
            weight=self._weight(),
        )
        ranks = agree(
            header, gather or self._gather, self._what(), self.rank, at_once=gather is None and self.local
        )
        self._heed(ranks)
        self._start_compared()
        return ranks, self._unite(numbers, part) if ranks.part_differs else part

    def _common(self, numbers: list[int], moving: list[Tensor]) -> dict[str, object]:
        """Returns what must be the same on all ranks at this synchronisation, by name."""
        return {
            "averager": type(self).__name__,
            "step": self.step,
            **self.settings(),
            **self._varying(),
            "parameter shapes": shown_layout(self._tensors(numbers)),
            "further tensors": f"{shown_layout(self._also)}; {self._state_layout(moving)}",
            "buffers": self._buffers.layout(),
            **({} if self.wire is None else {"tensors on the wire": shown_layout(moving)}),
        }

    def _check_wire(self) -> None:
        """Raises unless the wire is one, goes with this averager, and leaves the transport to it."""
        if self.wire is None:
            return
        name = type(self).__name__
        if not isinstance(self.wire, LowBit):
            got = self.wire if isinstance(self.wire, torch.dtype) else type(self.wire).__name__
            raise TypeError(f"wire must be a LowBit or torch.bfloat16, got {got}")
        if not self._takes_wire or self.reducer is not None:
            raise ValueError(
                "wire goes with LocalSGD, BlockMomentum, SlowMo and DiLoCo, without a reducer: got "
                f"{self.wire!r} for {name}, reducer={self.reducer!r}"
            )
        if self.wire.requested != "distributed":
            raise ValueError(
                f"wire: its transport is the averager's, so give transport= to {name}, got a {self.wire!r} "
                f"over {self.wire.requested!r}"
            )

    def _heed(self, ranks: Ranks) -> None:
        """Warns or raises by the ranks' votes, before any data is sent."""
        if ranks.starts_differ:
            self._starts_differ()
        if ranks.models_equal and self.world_size > 1 and self.rank == 0:
            logger.warning(
                "%s: the models were equal on all ranks before they were averaged. Where DDP reduces "
                "gradients at every step averaging saves nothing: register local_hook, or train the bare "
                "module",
                self._what(),
            )
        if not ranks.nonfinite:
            return
        where = f"{self._what()}: NaN or Inf in the parameters of ranks {list(ranks.nonfinite)}"
        if self._nonfinite == "error" or len(ranks.nonfinite) == len(ranks.weights):
            raise NonFiniteGradientError(f"rank {self.rank}, {where}; nothing was averaged")
        logger.warning("%s, which are left out of the average", where)

    def _unite(self, numbers: list[int], part: list[int]) -> list[int]:
        """Returns the numbers of the tensors that take part on some rank. It is called where ranks differ."""
        votes = torch.tensor([int(n in part) for n in numbers], dtype=torch.int64, device="cpu")
        self._channel.total(votes, f"{self._what()}, who takes part")
        return [n for n, vote in zip(numbers, votes.tolist(), strict=True) if vote > 0]

    def _average_plainly(self, tensors: list[Tensor], ranks: Ranks) -> None:
        if tensors:
            flat = flatten(tensors, message_dtype(tensors))
            mean = self._channel.mean(flat, f"{self._what()}, further tensors", ranks.share(self.rank))
            unflatten_(tensors, mean)

    def _synchronise_buffers(self, ranks: Ranks) -> None:
        """Averages the floating buffers or broadcasts all."""
        what = f"{self._what()}, buffers"
        self._channel.broadcast(self._buffers.broadcast(), 0, what)
        average_exactly(
            self._buffers.averaged(),
            lambda flat: self._channel.total(flat, what),
            self.world_size,
            ranks.full_share(self.rank),
            ranks.nonfinite_buffers and self._leaves_out_nonfinite,
        )

    # -- what an algorithm overrides -------------------------------------------------------------------------

    @abstractmethod
    def _average(self, tensors: list[Tensor], ranks: Ranks) -> None:
        """Overwrites the tensors by one averaging of the algorithm."""

    def _varying(self) -> dict[str, object]:
        """Returns the settings that must be the same on all ranks now but may change during a run."""
        return {}

    def _divide(self, part: list[int]) -> tuple[list[int], list[int]]:
        """Divides the numbers: those that :meth:`_average` gets, and those averaged plainly."""
        return part, []

    def _before_average(self, main: list[int]) -> None:
        """Called before the tensors of these numbers are given to :meth:`_average`."""

    def _averaged(self, part: list[int]) -> None:
        """Called after the tensors of these numbers were averaged."""

    def _check_members(self, numbers: list[int]) -> None:
        """Raises ``ValueError`` when these are not the tensors that the averager remembers."""

    def _start_from(self, numbers: list[int]) -> None:
        """Makes the tensors, as they are now, the common starting point, and forgets an earlier one."""
        self._members.averaged(numbers)
        self._expect_steps()

    def _starting_point(self) -> int:
        """Returns a fingerprint of the starting point that is still to be compared, or 0."""
        return self._start

    def _start_compared(self) -> None:
        """Called when the ranks have compared their starting points."""
        self._start = 0

    def _starts_differ(self) -> None:
        """Called when the ranks' starting points differ."""
        logger.warning(
            "%s: the ranks started from different models: give them one seed, or call broadcast_parameters",
            self._what(),
        )

    def _is_in_place(self) -> bool:
        """Whether the model is as this averager left it. It is called before the first step of a block.

        This base class does not remember the model and returns True. Before the first averaging it notes the
        fingerprint of the starting point, which the ranks compare.
        """
        if self.synchronisations == 0 and not (self._channel.is_open and self.world_size == 1):
            self._start = digest_of(self._watched)
        return True

    def _no_step_seen(self) -> None:
        """Called after a local step that no torch optimizer took which holds a parameter of the model."""

    def _with_state(self, tensors: list[Tensor]) -> list[Tensor]:
        """Returns the tensors, followed by the optimizer state that is averaged with them."""
        return tensors

    def _state_layout(self, tensors: list[Tensor]) -> str:
        """Returns the layout of that state, which must be the same on all ranks."""
        return ""

    def _weight(self) -> float:
        """Returns this rank's share in averages, relative to the others'."""
        return 1.0

    # -- pieces the algorithms are made of -------------------------------------------------------------------

    def _tensors(self, numbers: Sequence[int]) -> list[Tensor]:
        return [self._members.tensors[n] for n in numbers]

    def _expect_steps(self) -> None:
        """Notes that the model should not change before the next optimizer step, and watches for it."""
        self._fresh = True
        if self._watched:
            watch.call_before_step(self, self._before_step)

    def _before_step(self) -> None:
        """Checks, before a block's first optimizer step, whether the model was changed."""
        fresh, self._fresh = self._fresh, False
        if not fresh or self._is_in_place():
            return
        if self.synchronisations == 0:  # weights were loaded after the averager was made
            logger.info("%s starts from the model as it is now, not as it was made", type(self).__name__)
            self._start_from(self._members.see(self._watched))
            self._fresh = False
            return
        logger.warning(
            "%s: the model is not where the averager left it. What was changed counts as local steps. After "
            "loading weights call broadcast_parameters, or load this rank's own model and the averager's "
            "state together",
            self._what(),
        )

    def _transports(self) -> list[Transport]:
        used = [self.transport]
        if self.reducer is not None and self.reducer.connection.is_open:
            used.append(self.reducer.connection.transport)
        return used[:1] if used[-1] is used[0] else used

    @contextmanager
    def _communicating(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Opens the transport for these tensors. In the block autograd is off and errors are reported."""
        self._channel.open_for(tensors)
        with torch.inference_mode(False), torch.no_grad(), reporting(*self._transports()):
            yield

    def _what(self) -> str:
        return f"{type(self).__name__} after step {self.step}"

    def _gather(self, own: Tensor) -> tuple[Tensor, list[int]]:
        """Gathers the messages ``(P, n)`` of all ranks. Returns them and the rank of each row."""
        messages = own.new_empty((self.world_size, *own.shape))
        self.transport.all_gather(own, messages, tag=TAG, what=f"{self._what()}, agreement on settings")
        return messages, list(range(self.world_size))

    # -- state -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Returns this rank's state: the counts, copies of the algorithm's tensors, and the reducer's memory.

        Save it with the model's and the optimizer's on every rank. Loaded together at the same world size,
        they continue the run bit for bit. For another world size see
        :func:`~commhooks.averaging.average_checkpoints`.

        Raises:
            RuntimeError: inside ``common_model()``, where the parameters are not this rank's own.
        """
        self._refuse_common_model("state_dict()")
        return {
            "step": self.step,
            "synchronisations": self.synchronisations,
            "rank": self.rank,
            "world_size": self.world_size,
            "settings": self.settings(),
            "members": self._members.state_dict(),
            "shared": self._shared_state(),
            "reducers": None if self.reducer is None else [self.reducer.state_dict()],
            **self._own_state(),
        }

    def load_state_dict(self, state: dict[str, Any], *, strict: bool = True) -> None:
        """Takes over a state of this rank at this world size, or one that ``average_checkpoints`` made.

        Each saved setting that differs from this averager's is logged, and this averager's is used.
        ``strict`` is that of :meth:`~commhooks.Reducer.load_state_dict`.

        Raises:
            ValueError: the state is another rank's, or of another world size and not averaged.
            RuntimeError: inside ``common_model()``.
        """
        self._refuse_common_model("load_state_dict()")
        saved = (state["rank"], state["world_size"])
        if saved not in ((self.rank, self.world_size), (None, None)):
            raise ValueError(
                f"state is of rank {saved[0]} of {saved[1]}, this is rank {self.rank} of {self.world_size}: "
                f"load each rank's own, or join all of them with average_checkpoints"
            )
        if self.reducer is None and any(withheld(held) for held in state["reducers"] or []):
            complain(["the residuals would be lost: this averager has no reducer"], strict)
        self._members.load_state_dict(state.get("members", {"trained": []}))
        self._load_shared_state(state["shared"])
        self.step, self.synchronisations = state["step"], state["synchronisations"]
        self._fresh = False
        self._compare_saved(state.get("settings", self.settings()))
        if self.reducer is not None and state["reducers"] is not None:
            reducers = state["reducers"]
            self.reducer.load_state_dict(reducers[0] if saved != (None, None) else reducers, strict=strict)
        self._load_own_state(state)

    def _compare_saved(self, saved: dict[str, object] | str) -> None:
        """Logs what differs between the settings of a saved state and this averager's."""
        here = self.settings()
        if isinstance(saved, str):  # of an earlier version, which cannot be compared by name
            logger.warning("the state was saved by %s; the run goes on with %s", saved, self._shown())
            return
        differ = [name for name in {**saved, **here} if saved.get(name) != here.get(name)]
        if differ:
            values = (f"{n}: {saved.get(n, 'nothing')} saved, {here.get(n, 'nothing')} here" for n in differ)
            logger.warning(
                "the state was saved with other settings, and this %s goes on with its own: %s",
                type(self).__name__,
                "; ".join(values),
            )

    def _own_state(self) -> dict[str, Any]:
        """Returns the part of the state that differs from rank to rank, beside the reducer's, by name."""
        return {}

    def _load_own_state(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`_own_state` returned."""

    def _shared_state(self) -> dict[str, Any]:
        """Returns the part of the state that is the same on every rank, as new tensors and numbers."""
        return {}

    def _load_shared_state(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(f"{type(self).__name__} has no shared state, got {sorted(state)}")


def tell_parameters(averager: Averager, params: Parameters) -> None:
    """Tells an averager that has not begun its parameters, so that the ranks compare where they start.

    It has no effect on an averager that was made with parameters or a module.
    """
    if not averager._watched and averager.step == 0:
        averager._watched = tensors_of(params)
        watch.watch(averager._watched, averager)
        averager._expect_steps()


class StepHook:
    """An averager's hook on an optimizer. As a context manager it is removed at the end of its block."""

    def __init__(self, handle: RemovableHandle, then: Callable[[], None]) -> None:
        self._handle, self._then = handle, then

    def remove(self) -> None:
        """Removes the hook. From now on ``average_parameters`` is called by hand again."""
        self._handle.remove()
        self._then()

    def __enter__(self) -> StepHook:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def _nonfinite(tensors: Sequence[Tensor]) -> bool:
    """Whether NaN or Inf is among the elements. Each one is read only where a sum is not finite."""
    parts = [p for t in tensors for p in ([t.real, t.imag] if t.is_complex() else [t])]
    return not all(math.isfinite(float(p.sum())) for p in parts) and has_nonfinite(tensors)
