"""``Reducer``: runs the whole pipeline, from a gradient to its average."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import NonFiniteGradientError, SettingsMismatchError, says_what_to_write
from ..exchange import Aggregator, Dense, LowBit
from ..exchange.agreement import STEP_ADVICE, WAS_RETURNED, agree, agree_on_context
from ..gradient.bucket import Bucket
from ..memory import ErrorFeedback, Memory, NoMemory
from ..memory.owner_memory import OwnedChunk, without_owners
from ..memory.parameter_memory import BucketMemory
from ..memory.resharding import check_states, redistributed
from ..memory.single_user import claim
from ..schemes import UNSET, check_scheme, chosen_memory
from ..selection.selectors import Selector
from ..transports import Connection, Transport, check_timeout
from ..wire.low_bit import chunks
from ..wire.message import RETURNED, Context, OutOfStepError
from .checkpoint import check_fits, description, in_units_of
from .dense_rule import Crossover, DenseRule
from .expected import Expected
from .routes import PlainRoute, Route, route_of
from .sizes import Sizes
from .step import Step

_AGREEMENT_TAG = 30
_SETTINGS = (
    "selector", "aggregator", "memory", "average", "nonfinite", "dense_crossover", "delta_every", "timeout_s",
    "undoable",
)  # fmt: skip


class Reducer:
    """Replaces flat gradients by the average over ranks of the part that was sent.

    For every bucket, any world size P and each element,
    ``sum_p residual_p + P * update = sum_p corrected_p``: what is not in the update is in a residual. With
    ``LowBit`` the owner of an element keeps a part of its mean too, which counts P times.

    Args:
        selector: chooses the elements that are sent. ``None`` only with ``Dense`` and ``LowBit``.
        aggregator: sums the ranks' selections, over the transport that it names.
        memory: keeps what is not sent, and belongs to this Reducer alone. Default: ``NoMemory()`` with
            ``Dense``, which sends everything, and else ``ErrorFeedback()``.
        average: whether to divide the sum by the world size.
        nonfinite: what happens on all ranks when any rank's gradient holds NaN or Inf, which never enter a
            memory. ``"propagate"``: the bucket becomes NaN on all ranks, as under plain DDP, so that a
            GradScaler skips the step, and the step's other buckets put back what they sent. ``"skip"``: the
            bucket's update is 0. ``"error"``: ``NonFiniteGradientError`` on all ranks.
        dense_crossover: True: a bucket and its residual are sent densely when that takes fewer bytes (early
            in a warm-up). False: never. Or a rule ``(numel, k, world_size) -> bool``, the same on all ranks.
        delta_every: measure delta every so many steps, by one dense all-reduce per sparse bucket: how the
            selection compares with a random one (Assumption 1 of the gTop-k paper). 0: never.
        timeout_s: seconds until a missing peer is an error. None: the process group's timeout, or 300 s
            without a group.
        undoable: keep the memory from before each step, so that :meth:`discard` can restore it. It takes as
            much memory again as residuals and velocities.

    Attributes:
        step: number of finished steps.
        is_inside: whether a step is under way, or was ended by an error of the exchange.
        last_delta: the last measured delta, or None.
        connection: opens the transport and holds it.

    Raises:
        ValueError: an unknown policy, a number out of range, a selector that does not fit the aggregator, or
            a memory that another Reducer has.
        TypeError: an argument of the wrong kind.
    """

    @says_what_to_write
    def __init__(
        self,
        selector: Selector | None,
        aggregator: Aggregator,
        memory: Memory | None = UNSET,
        *,
        average: bool = True,
        nonfinite: str = "propagate",
        dense_crossover: Crossover = True,
        delta_every: int = 0,
        timeout_s: float | None = None,
        undoable: bool = False,
    ) -> None:
        check_scheme(selector, aggregator)
        if not isinstance(delta_every, int) or delta_every < 0:
            raise ValueError(f"delta_every must be an integer >= 0, got {delta_every!r}")
        if timeout_s is not None:
            check_timeout(timeout_s)
        self.selector, self.aggregator = selector, aggregator
        self.connection = Connection(aggregator.requested)
        self.memory = chosen_memory(memory, aggregator)
        self.average, self.timeout_s, self.undoable = average, timeout_s, bool(undoable)
        self.dense_crossover, self.delta_every = dense_crossover, delta_every
        self._dense_rule = DenseRule(dense_crossover, aggregator)
        self.step = 0
        self.last_delta: float | None = None
        self._step, self.nonfinite = Step(nonfinite), nonfinite
        self._sends_everything = self._can_discard = self.is_inside = False
        self._sizes = Sizes()
        self._expected: Expected | None = None
        self._agreed: dict[int, tuple[int, ...]] = {}  # layouts of plain buckets, by index
        claim(self.memory, self, "memory", "state, compression or Reducer")

    def open(self, process_group: Any = None, device_type: str = "cpu") -> Transport:
        """Opens the transport if it is not open yet. A collective call; :meth:`reduce` makes it too.

        Args:
            process_group: whose ranks take part, for the ``"distributed"`` transport. None: the
                default group.
            device_type: where gradients live, such as ``"cpu"`` or ``"cuda"``.
        """
        return self.connection.open(
            timeout_s=self.timeout_s, process_group=process_group, device_type=device_type
        )

    @property
    def transport(self) -> Transport:
        """The open transport.

        Raises:
            RuntimeError: it is not open yet.
        """
        return self.connection.transport

    def reduce(self, bucket: Bucket, scale: float = 1.0) -> None:
        """Overwrites ``bucket.buffer`` with the average over ranks. A collective call.

        Args:
            bucket: the gradient. All ranks pass buckets of the same indices in the same order.
            scale: the loss scale by which the gradient is multiplied. The memory is kept in unscaled units,
                and the result is multiplied by the scale again.

        Raises:
            SettingsMismatchError: ranks disagree on settings or sizes.
            PeerTimeoutError, PeerLostError: a rank is missing.
            NonFiniteGradientError: with ``nonfinite="error"``.
        """
        transport = self.open(device_type=bucket.buffer.device.type)
        route, step = self._route(bucket, scale, transport), self._step
        self.is_inside = True
        with step.figures.phase("select"):
            route.correct()
        step.figures.add(misses=route.misses)
        with step.figures.phase("exchange", transport.counters):
            thrown_away = self._exchange(route, transport)
        if thrown_away:
            route.take_back()
            found = f"{route.bad} non-finite gradient elements {route.where}"
            text = f"step {self.step}, bucket {bucket.index}: {found}"
            try:
                step.throw_away(bucket.buffer, bucket.index, text, transport.rank)
            except NonFiniteGradientError:  # the step is rolled back
                self.is_inside = False
                raise
        else:
            factor = scale / transport.world_size if self.average else scale
            with step.figures.phase("write_back"):
                route.write(bucket.buffer, factor, share=factor * transport.world_size)
            step.keep(route.commit, route.rollback)
        if bucket.is_last:
            self.finish_step()

    def finish_step(self) -> None:
        """Ends the step: commits its exchanges, or rolls them back when a bucket was thrown away.

        Under ``nonfinite="skip"`` the other buckets are committed all the same. :meth:`reduce` calls this
        after a bucket whose ``is_last`` is True.
        """
        if self._measures_delta:
            self.last_delta = self._step.figures.delta.value()
        self._step.finish()
        self._sends_everything, self._can_discard = False, True
        self.step += 1
        self.is_inside = False

    def discard(self) -> None:
        """Undoes the last step: memory, step number and schedules are as before it, bit for bit.

        It is not collective, but all ranks must discard the same step. If only some do, the next step raises
        ``SettingsMismatchError``.

        Raises:
            RuntimeError: the Reducer is not ``undoable``, a step is under way, or there is no step to
                discard.
        """
        if not self.undoable:
            raise RuntimeError(
                "discard() needs the memory from before the step: pass undoable=True when making the state"
            )
        if self._step.is_under_way:
            raise RuntimeError(
                "discard() inside a backward pass: call it between backward() and the next forward pass"
            )
        if not self._can_discard:
            raise RuntimeError("discard(): there is no step to discard, or it was discarded already")
        self._can_discard = False
        self.step -= 1
        self.memory.table.discard(self.step)

    def set_average(self, average: bool) -> None:
        """Makes the result the average over ranks, or their sum. Call it between steps, on all ranks."""
        self.average = average

    def send_everything(self) -> None:
        """Sends the remaining buckets of this step densely, with their residuals.

        Between steps it applies to all buckets of the next step.
        """
        self._sends_everything = True

    @property
    def nonfinite_buckets(self) -> list[int]:
        """Indices of the buckets that were thrown away in the last finished step."""
        return self._step.last.nonfinite_buckets

    @property
    def remembers(self) -> bool:
        """Whether something is withheld or has momentum. If not, a float32 buffer itself is all-reduced."""
        return not (isinstance(self.aggregator, Dense) and isinstance(self.memory, NoMemory))

    def settings(self) -> dict[str, object]:
        """Returns all settings that must be equal on all ranks, by name."""
        selector = {} if self.selector is None else self.selector.settings()
        return {
            **selector,
            "selector": type(self.selector).__name__,
            "aggregator": type(self.aggregator).__name__,
            **self.aggregator.settings(),
            "memory": type(self.memory).__name__,
            **self.memory.settings(),
            "average": self.average,
            "nonfinite": self.nonfinite,
            # a function's name, as its address differs from process to process
            "dense_crossover": getattr(self.dense_crossover, "__qualname__", self.dense_crossover),
            "delta_every": self.delta_every,
            "undoable": self.undoable,
        }

    def stats(self) -> dict[str, Any]:
        """Returns figures of the last finished step on this rank, and the present norm of its residuals."""
        residual_norm = self.memory.table.residual_norm()
        return {
            "step": self.step,
            **self._step.stats(),
            "residual_norm": residual_norm,
            "delta": self.last_delta,
        }

    def state_dict(self, *, last_counts: bool = True) -> dict[str, Any]:
        """Returns this rank's memory by parameter name, the step, and what made them. Call it between steps.

        ``"scheme"`` has the names of selector, aggregator and memory, and the momentum. Inside a step an
        ``undoable`` Reducer returns the state from before the step.

        Args:
            last_counts: False: the averages of the last step have not reached the model, so the state from
                before that step is returned.

        Raises:
            ValueError: a parameter has no name.
            RuntimeError: the state from before a step is needed, and the Reducer is not ``undoable``.
        """
        before = None
        if self.is_inside:
            before = self.step
        elif not last_counts and self._can_discard:
            before = self.step - 1
        keeps = self.memory.table.with_residual or self.memory.table.with_velocity
        if before is not None and keeps and not self.undoable:
            raise RuntimeError(_MID_STEP.format(where="inside a step" if self.is_inside else _UNUSED))
        transport = self.transport if self.connection.is_open else None
        place = (transport.rank, transport.world_size) if transport else (0, 1)
        made_by = description(self.selector, type(self.aggregator).__name__, self.memory)
        step = self.step if before is None else before
        return {"rank": place[0], "world_size": place[1], "step": step, "scheme": made_by} | (
            self.memory.table.state_dict(before)
        )

    def restart(self, saved: dict[str, Any]) -> None:
        """Restores this rank's own ``state_dict()`` and forgets a step that has begun. Not collective."""
        self._forget_step()  # no rollback is needed: the memory is replaced
        self._expected, self._agreed = None, {}
        self.step, self._can_discard = int(saved["step"]), False
        self.memory.table.load(saved)

    def reset(self) -> None:
        """Sets the memory to zero and starts at step 0. It is not collective.

        All ranks must do so between the same steps. If only some do, the next step raises
        ``SettingsMismatchError``.
        """
        self._expected = self._expected_next()
        self._forget_step()
        self.step, self._can_discard = 0, False
        self.memory.table.forget()

    def load_state_dict(self, state: dict[str, Any] | list[dict[str, Any]], *, strict: bool = True) -> None:
        """Loads this rank's state, or all ranks' states of a run with any world size.

        What owners kept in low-bit exchanges goes to the residuals where the exchange has no owners, and
        velocities are converted between Nesterov's and Polyak's form. All ranks must load between the same
        steps. If only some do, the next step raises ``SettingsMismatchError``.

        Args:
            state: what this rank's :meth:`state_dict` returned, or the list of all ranks' in rank order. When
                the world size differs the list is redistributed so that ``sum_p residual_p / P`` is kept.
            strict: False: a memory that does not fit is loaded all the same, and what is dropped is logged.

        Raises:
            ValueError: one state of a run with another world size, or states that do not belong together; a
                format of a later version; or a memory that does not fit: it would be dropped, or random-k
                would go on with momentum.
        """
        expected, agreed = self._expected_next(), self._agreed
        transport = self.open()
        states = state if isinstance(state, list) else [state]
        check_states(states, isinstance(state, list), transport.rank, transport.world_size)
        for saved in states:
            check_fits(saved, self.selector, self.memory, strict)
        if len(states) == 1 and not isinstance(state, list):
            mine = states[0]
        elif len(states) == transport.world_size:
            mine = states[transport.rank]
        else:
            mine = {**states[0], **redistributed(states, transport.rank, transport.world_size)}
        if not isinstance(self.aggregator, LowBit):
            mine = without_owners(mine, transport.world_size)
        self.restart({**in_units_of(self.memory, mine), "step": states[0]["step"]})
        if expected is not None and expected.transport is transport:
            self._expected, self._agreed = expected, agreed

    def __getstate__(self) -> dict[str, Any]:
        # The settings are all that a later version needs to make a Reducer of its own.
        return {name: getattr(self, name) for name in (*_SETTINGS, "step")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        settings = {name: state[name] for name in _SETTINGS if name in state}
        self.__init__(**settings)  # type: ignore[misc]
        self.step = state["step"]

    def _forget_step(self) -> None:
        """Forgets the step under way: the next bucket is a step's first."""
        self._step.forget()
        self._sizes = Sizes()
        self._sends_everything = self.is_inside = False

    def _route(self, bucket: Bucket, scale: float, transport: Transport) -> Route:
        """Chooses the bucket's route. At a new layout the ranks compare their settings first."""
        buffer, context = bucket.buffer, Context(bucket.index, self.step)
        self._step.figures.add(dense_bytes=bucket.numel * buffer.element_size())
        if not self.remembers and buffer.dtype == torch.float32:
            # Nothing in a plain sum tells the step, and a rank may have discarded the last one alone.
            if self._agreed.get(bucket.index) != bucket.numels or (self.undoable and not self.is_inside):
                self._agree(bucket, bucket.numel, 1.0, transport)
                self._agreed[bucket.index] = bucket.numels
            return PlainRoute(buffer, context)
        returned = self._announce_return(bucket, transport)
        selector, memory, numel = self.selector, self.memory, bucket.numel
        held, is_new = memory.for_bucket(bucket)
        if self.undoable:
            memory.table.keep_rates(held)
        chunk = self._owned(bucket, held, transport)  # may add to the residual
        operands = memory.operands(held, bucket, scale=_inverse(scale, buffer))
        k, must_agree = numel, is_new or returned
        if selector is not None:
            # A rank that discarded the last step alone would send a message of another size than the others.
            must_agree |= self.undoable and self._sizes.changes(bucket.index)
            k, next_k = self._sizes.at(selector, bucket.index, numel, self.step, is_new)
            context = Context(bucket.index, self.step, next_k)
        if must_agree:
            self._agree(bucket, k, scale, transport, returned)
        if chunk is not None:
            chunk.begin(self.step, operands.rescale, self.undoable)
        if self.undoable:
            operands = held.apart(operands, self.step)
        dense = self._goes_dense(numel, k, transport.world_size)
        meter = self._step.figures.delta if self._measures_delta else None
        parts = (memory, held, operands, context)
        return route_of(parts, selector, self.aggregator, k, dense, chunk, meter)

    def _exchange(self, route: Route, transport: Transport) -> bool:
        """Runs a route's exchange. Ranks that are out of step compare what each of them exchanges."""
        try:
            return route.exchange(transport)
        except OutOfStepError:  # raised on all ranks
            agree_on_context(transport, route.context)
            raise

    def _expected_next(self) -> Expected | None:
        """Returns the exchange that the other ranks expect next, for a reset or load to announce itself in.

        None: they expect none, as after a failed step.
        """
        if self.is_inside or not self.connection.is_open:
            return None
        layouts = self.memory.table.layouts()
        return self._expected or Expected(
            self.transport, self.step, layouts, self._sizes, self._sends_everything
        )

    def _announce_return(self, bucket: Bucket, transport: Transport) -> bool:
        """Notices ranks that were not reset or loaded with this one, at the next bucket.

        Ranks that were not reset send a message of the size that they had announced. So the ranks that were
        reset first send zeros in a message of that size, which says that they were.

        Returns:
            Whether this rank was reset or loaded. Then all ranks were, and compare their settings next.

        Raises:
            SettingsMismatchError: a rank was not, or the ranks have loaded different steps.
        """
        expected, self._expected = self._expected, None
        if expected is None or not expected.layouts:
            return False
        if not expected.comes_at_once(bucket, transport, self.undoable):
            return True
        memory = NoMemory() if isinstance(self.memory, NoMemory) else ErrorFeedback()
        context = Context(bucket.index, self.step, RETURNED)
        route = expected.zeros(bucket, context, memory, self.selector, self.aggregator, self._goes_dense)
        with transport.uncounted():
            if self._exchange(route, transport):  # zeros are finite, and so no rank that was reset voted
                raise SettingsMismatchError(
                    f"rank {transport.rank}, {context}: reset() or load_state_dict() was called here, and "
                    "another rank has gone on with the step before"
                )
        return True

    def _owned(self, bucket: Bucket, held: BucketMemory, transport: Transport) -> OwnedChunk | None:
        """What this rank keeps as an owner in low-bit exchanges. None: there are none, or nothing is kept.

        A bucket that is sent densely has no owners: its residual takes over what they kept.
        """
        table, world_size = self.memory.table, transport.world_size
        if not isinstance(self.aggregator, LowBit) or not table.with_residual:
            return None
        bounds = chunks(bucket.numel, world_size)[transport.rank]
        if self._goes_dense(bucket.numel, bucket.numel, world_size):
            bounds = (0, 0)
        undoable_step = self.step if self.undoable else None
        return table.owned.of_bucket(bucket.index, held, bounds, world_size, table.names, undoable_step)

    @property
    def _measures_delta(self) -> bool:
        return self.delta_every > 0 and self.step % self.delta_every == 0

    def _goes_dense(self, numel: int, k: int, world_size: int) -> bool:
        return self._sends_everything or self._dense_rule.goes_dense(numel, k, world_size)

    def _agree(
        self, bucket: Bucket, k: int, scale: float, transport: Transport, returned: bool = False
    ) -> None:
        context = Context(bucket.index, self.step)
        settings = {
            "bucket": bucket.index,
            "step": self.step,
            WAS_RETURNED: returned,
            "elements": bucket.numel,
            "parameters": len(bucket.keys),
            "dtype": bucket.buffer.dtype,
            "loss scale": f"{scale:g}",
            "k": k,
            **self.settings(),
        }
        tag, what = context.tag + _AGREEMENT_TAG, f"bucket {bucket.index}"
        agree(transport, settings, tag=tag, what=what, advice=STEP_ADVICE)


_UNUSED = "after backward() and before the optimizer's step"
_MID_STEP = (
    "state_dict() {where}: the memory has gone on and the model has not, so the two do not fit. Call it "
    "after the optimizer's step (a signal handler may set a flag for the loop to read), or pass "
    "undoable=True when making the state: the memory from before the step is returned then. A backward "
    "pass that does not count belongs inside state.passthrough()"
)


def _inverse(scale: float, like: Tensor) -> Tensor | None:
    """Returns ``1 / scale`` as one float32 element on the device of ``like``; None for 1."""
    if scale == 1.0:
        return None
    return torch.tensor([1.0 / scale], dtype=torch.float32, device=like.device)
