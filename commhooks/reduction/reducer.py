"""``Reducer``: the one place that knows the whole line from a gradient to the average that replaces it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import NonFiniteGradientError, says_what_to_write
from ..exchange import Aggregated, Aggregator
from ..exchange.agreement import check_agreement
from ..exchange.dense import dense_wire_bytes
from ..exchange.voting_sum import summed
from ..gradient.bucket import Bucket
from ..gradient.sparse_grad import SparseGrad
from ..gradient.write_back import write_dense, write_sparse
from ..memory import Memory, NoMemory
from ..memory.parameter_memory import BucketMemory
from ..memory.resharding import check_states, redistributed
from ..schemes import UNSET, check_scheme, chosen_memory
from ..selection.selectors import Selector
from ..transports import Connection, Transport
from ..wire.message import Context
from .stats import DeltaMeter, StepFigures

logger = logging.getLogger(__name__)

NONFINITE = ("propagate", "skip", "error")
_AGREEMENT_TAG = 30
_SETTINGS = (
    "selector", "aggregator", "memory", "average", "nonfinite", "dense_crossover", "delta_every", "timeout_s",
)  # fmt: skip


@dataclass(frozen=True)
class _Written:
    """A bucket whose result is out, until the step is known to be good."""

    commit: Callable[[], None]
    rollback: Callable[[], None]


class Reducer:
    """Replaces flat gradients by their average over ranks, of which only a sparse part travelled.

    For every bucket and any world size P it conserves, per element,
    ``sum_p residual_p + P * update = sum_p corrected_p``.

    Args:
        selector: what to send; ``None`` only with the ``Dense`` aggregator.
        aggregator: how selections become a sum, and over which transport.
        memory: None: ``ErrorFeedback()`` behind a selector, ``NoMemory()`` with ``Dense``, which withholds nothing.
        average: divide the sum by the world size.
        nonfinite: what NaN or Inf on any rank does, alike on all ranks. It never enters a memory.
            ``"propagate"``: the bucket becomes NaN everywhere, as under plain DDP, so that a GradScaler
            skips; the step's other buckets put back what they sent. ``"skip"``: the bucket's update is 0.
            ``"error"``: ``NonFiniteGradientError`` on all ranks.
        dense_crossover: send a bucket densely when that takes fewer bytes (early warm-up); it takes its
            residual along.
        delta_every: measure Assumption 1's delta every so many steps (one dense all-reduce each); 0: never.
        timeout_s: seconds until a missing peer is an error. None: the process group's timeout, or 300 s without a group.

    Raises:
        ValueError: an unknown policy, or a selector that does not fit the aggregator.
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
        dense_crossover: bool | Callable[[int, int, int], bool] = True,
        delta_every: int = 0,
        timeout_s: float | None = None,
    ) -> None:
        check_scheme(selector, aggregator)
        if nonfinite not in NONFINITE:
            raise ValueError(f"nonfinite must be one of {NONFINITE}, got {nonfinite!r}")
        if not isinstance(delta_every, int) or delta_every < 0:
            raise ValueError(f"delta_every must be an integer >= 0, got {delta_every!r}")
        if timeout_s is not None and not timeout_s > 0:
            raise ValueError(f"timeout_s must be positive, got {timeout_s!r}")
        self.selector, self.aggregator = selector, aggregator
        self.connection = Connection(aggregator.requested)
        self.memory = chosen_memory(memory, selector)
        self.average, self.nonfinite = average, nonfinite
        self.dense_crossover, self.delta_every, self.timeout_s = dense_crossover, delta_every, timeout_s
        self.step = 0
        self.nonfinite_steps = 0
        self.last = StepFigures()
        self.last_delta: float | None = None
        self._current = StepFigures()
        self._delta = DeltaMeter()
        self._written: list[_Written] = []
        self._agreed: dict[int, tuple[int, ...]] = {}

    def open(self, process_group: Any = None, device_type: str = "cpu") -> Transport:
        """Opens the transport, once; a collective call. The first :meth:`reduce` does so by itself."""
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
        """Overwrites ``bucket.buffer`` with the average; blocks until all ranks took part.

        Args:
            bucket: the gradient; the same indices, in the same order, on all ranks.
            scale: loss scale the gradient carries. Memory is kept without it; the result carries it again.

        Raises:
            SettingsMismatchError: ranks disagree on settings or sizes.
            PeerTimeoutError, PeerLostError: a rank is missing.
            NonFiniteGradientError: with ``nonfinite="error"``.
        """
        self.open(device_type=bucket.buffer.device.type)
        context = Context(bucket.index, self.step)
        if not self.remembers and bucket.buffer.dtype == torch.float32:
            self._reduce_plain(bucket, context)
            return
        k = self.selector.k(bucket.numel, self.step) if self.selector is not None else bucket.numel
        held, is_new = self.memory.for_bucket(bucket)
        if is_new:
            self._agree(bucket, k, scale, context)
        self._current.dense_bytes += bucket.numel * bucket.buffer.element_size()
        if self._goes_dense(bucket.numel, k):
            self._reduce_dense(bucket, held, scale, context)
        else:
            self._reduce_sparse(bucket, held, k, scale, context)
        if bucket.is_last:
            self.finish_step()

    def finish_step(self) -> None:
        """Ends the step: what was sent is final, or goes back when any bucket of the step was thrown away."""
        thrown_away = bool(self._current.nonfinite_buckets) and self.nonfinite != "skip"
        for written in self._written:
            (written.rollback if thrown_away else written.commit)()
        self._written.clear()
        self.nonfinite_steps += bool(self._current.nonfinite_buckets)
        if self._measures_delta:
            self.last_delta, self._delta = self._delta.value(), DeltaMeter()
        self.last, self._current = self._current, StepFigures()
        self.step += 1

    def settings(self) -> str:
        """All that ranks must share, in one line."""
        rule = getattr(self.dense_crossover, "__qualname__", self.dense_crossover)  # no address of a function
        return (
            f"{self.selector!r} | {self.aggregator!r} | {self.memory.describe()} | average={self.average} "
            f"nonfinite={self.nonfinite} dense_crossover={rule} delta_every={self.delta_every}"
        )

    def stats(self) -> dict[str, Any]:
        """Figures of the last finished step on this rank, and the norm of its residual now."""
        last, sent = self.last, max(1, self.last.bytes_sent)
        return {
            "step": self.step,
            "bytes_sent": last.bytes_sent,
            "bytes_received": last.bytes_received,
            "dense_bytes": last.dense_bytes,
            "compression_ratio": last.dense_bytes / sent if last.bytes_sent else float("inf"),
            "residual_norm": self.memory.table.residual_norm(),
            "delta": self.last_delta,
            "misses": last.misses,
            "nonfinite_steps": self.nonfinite_steps,
            "seconds": dict(last.seconds),
        }

    def state_dict(self) -> dict[str, Any]:
        """This rank's memory by parameter name, and the step; call it between steps."""
        transport = self.transport if self.connection.is_open else None
        place = (transport.rank, transport.world_size) if transport else (0, 1)
        return {"version": 1, "rank": place[0], "world_size": place[1], "step": self.step} | (
            self.memory.table.state_dict()
        )

    def restart(self, saved: dict[str, Any]) -> None:
        """Goes back to this rank's own ``state_dict()`` and forgets a step that has begun; not collective."""
        self._forget_step()  # what it would put back is in the memory that is replaced here
        self._agreed.clear()
        self.step = int(saved["step"])
        self.memory.table.load(saved)

    def reset(self) -> None:
        """Forgets what is withheld and starts at step 0. All ranks must do so between the same steps."""
        self._forget_step()
        self.step = 0
        self.memory.table.forget()

    def load_state_dict(self, state: dict[str, Any] | list[dict[str, Any]]) -> None:
        """Loads this rank's state, or all ranks' states of a run with any world size.

        Args:
            state: what this rank's :meth:`state_dict` gave; or the list of all ranks' in rank order, which is
                redistributed so that ``sum_p residual_p / P`` is kept when the world size differs.

        Raises:
            ValueError: one state of a run with another world size, or states that do not belong together.
        """
        transport = self.open()
        states = state if isinstance(state, list) else [state]
        check_states(states, isinstance(state, list), transport.rank, transport.world_size)
        if len(states) == 1 and not isinstance(state, list):
            mine = states[0]
        elif len(states) == transport.world_size:
            mine = states[transport.rank]
        else:
            mine = {**states[0], **redistributed(states, transport.rank, transport.world_size)}
        self.restart({**mine, "step": states[0]["step"]})

    def __getstate__(
        self,
    ) -> dict[str, Any]:  # the settings: what a later version needs to make a Reducer of its own
        return {name: getattr(self, name) for name in (*_SETTINGS, "step")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        settings = {name: state[name] for name in _SETTINGS if name in state}
        self.__init__(**settings)  # type: ignore[misc]
        self.step = state["step"]

    def _agree(self, bucket: Bucket, k: int, scale: float, context: Context) -> None:
        check_agreement(
            self.transport,
            bucket=bucket.index,
            numel=bucket.numel,
            k=k,
            settings=f"loss scale {scale:g}, {bucket.buffer.dtype}, {len(bucket.keys)} parameters, {self.settings()}",
            step=context.step,
            tag=context.tag + _AGREEMENT_TAG,
        )

    def _goes_dense(self, numel: int, k: int) -> bool:
        if self.selector is None:
            return True
        world_size = self.transport.world_size
        if callable(self.dense_crossover):
            return self.dense_crossover(numel, k, world_size)
        sparse_bytes = self.aggregator.wire_bytes(k, world_size)
        return self.dense_crossover and sparse_bytes > dense_wire_bytes(numel, world_size)

    def _factor(self, scale: float) -> float:
        return scale / self.transport.world_size if self.average else scale

    def _reduce_sparse(
        self, bucket: Bucket, held: BucketMemory, k: int, scale: float, context: Context
    ) -> None:
        assert self.selector is not None
        memory, figures, transport = self.memory, self._current, self.transport
        inverse = _inverse(scale, bucket.buffer)
        with figures.phase("select"):
            operands = memory.operands(held, bucket.buffer, scale=inverse)
            selected = self.selector.select(operands, k, step=self.step, mask_key=bucket.index)
            report = selected.report.tolist()
            pairs = SparseGrad(selected.values, selected.indices, bucket.numel)
            figures.misses += report[2]
        with figures.phase("exchange"), figures.traffic(transport.counters):
            out = self.aggregator.aggregate(transport, pairs, report[1] > 0, context)
        if out.nonfinite:
            memory.restore(held, pairs)
            memory.undo(held, bucket.buffer, scale=inverse)
            self._throw_away(bucket, report[1])
            return
        with figures.phase("write_back"):
            if out.refused is not None:
                memory.restore(held, out.refused)
            if self._measures_delta:
                self._delta.add(transport, held.residual, out, k, context.tag)
            factor = self._factor(scale)
            share = factor * transport.world_size
            rounding = write_sparse(bucket.buffer, out.values, out.indices, factor, share)
        self._keep_until_known(held, out, rounding, masks=k < bucket.numel)

    def _keep_until_known(
        self, held: BucketMemory, out: Aggregated, rounding: SparseGrad | None, masks: bool
    ) -> None:
        memory, contributed = self.memory, out.contributed

        def commit() -> None:
            if masks:
                memory.mask_velocity(held, contributed)
            if rounding is not None:
                memory.restore(held, rounding)

        self._written.append(_Written(commit, lambda: memory.restore(held, contributed)))

    def _reduce_dense(self, bucket: Bucket, held: BucketMemory, scale: float, context: Context) -> None:
        memory, figures, transport = self.memory, self._current, self.transport
        inverse = _inverse(scale, bucket.buffer)
        with figures.phase("select"):
            bad = memory.accumulate(held, bucket.buffer, scale=inverse)
            active = held.active(bucket.buffer)
            sent = held.residual if active is None else held.residual * active
        with figures.phase("exchange"), figures.traffic(transport.counters):
            total, thrown_away = summed(transport, sent, bad > 0, context)
        if thrown_away:
            memory.undo(held, bucket.buffer, scale=inverse)
            self._throw_away(bucket, bad)
            return
        with figures.phase("write_back"):
            factor = self._factor(scale)
            share = factor * transport.world_size
            rounding = write_dense(bucket.buffer, total, factor, share)

        def commit() -> None:  # until then the residual still holds all that was sent
            kept = held.residual.new_zeros(()) if active is None else held.residual * ~active
            held.residual.copy_(kept if rounding is None else kept + rounding)

        self._written.append(_Written(commit, lambda: None))

    @property
    def remembers(self) -> bool:
        """Whether anything is selected or kept. If not, the buffer itself is all-reduced."""
        return self.selector is not None or not isinstance(self.memory, NoMemory)

    def _reduce_plain(self, bucket: Bucket, context: Context) -> None:
        """As DDP without a hook. NaN and Inf need no vote: they stay in the sum."""
        transport, figures, buffer = self.transport, self._current, bucket.buffer
        if self._agreed.get(bucket.index) != bucket.numels:
            self._agree(bucket, bucket.numel, 1.0, context)
            self._agreed[bucket.index] = bucket.numels
        figures.dense_bytes += bucket.numel * buffer.element_size()
        with figures.phase("exchange"), figures.traffic(transport.counters):
            transport.all_reduce(buffer, tag=context.tag, what=str(context))
        with figures.phase("write_back"):
            buffer.mul_(self._factor(1.0))
            bad = 0 if bool(buffer.sum().isfinite()) else int((~buffer.isfinite()).sum())
        if bad:
            self._throw_away(bucket, bad, "in the sum over ranks")
        if bucket.is_last:
            self.finish_step()

    def _throw_away(self, bucket: Bucket, count: int, where: str = "on this rank") -> None:
        """Applies the policy to a bucket that some rank found non-finite; the memory has been undone."""
        self._current.nonfinite_buckets.append(bucket.index)
        message = f"step {self.step}, bucket {bucket.index}: {count} non-finite gradient elements {where}"
        if self.nonfinite == "skip":
            logger.warning("%s; the bucket's update is skipped on all ranks", message)
            bucket.buffer.zero_()
            return
        bucket.buffer.fill_(float("nan"))
        if self.nonfinite == "error":
            for written in self._written:
                written.rollback()
            self._forget_step()
            self.nonfinite_steps += 1
            raise NonFiniteGradientError(f"rank {self.transport.rank}, {message}")

    def _forget_step(self) -> None:
        """The next bucket begins a step anew."""
        self._written.clear()
        self._current = StepFigures()

    @property
    def _measures_delta(self) -> bool:
        return self.delta_every > 0 and self.step % self.delta_every == 0


def _inverse(scale: float, like: Tensor) -> Tensor | None:
    if scale == 1.0:
        return None
    return torch.tensor([1.0 / scale], dtype=torch.float32, device=like.device)
