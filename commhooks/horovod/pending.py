"""What both compressors share: memory per parameter, the vote, agreement of the ranks, thrown-away steps."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import NonFiniteGradientError, SettingsMismatchError
from ..gradient.bucket import Bucket
from ..gradient.sparse_grad import SparseGrad
from ..gradient.write_back import write_sparse
from ..memory import ErrorFeedback, Memory
from ..memory.parameter_memory import BucketMemory
from ..reduction.reducer import NONFINITE
from ..reduction.stats import StepFigures
from ..selection.selectors import Selector
from .api import check_process_set, horovod, wait_for
from .parameters import Entry, ParameterTable

logger = logging.getLogger(__name__)

_AGREEMENT_BYTES = 512
# Compressions of one process set are made in the same order on all its ranks.
_numbers: dict[Any, Iterator[int]] = defaultdict(itertools.count)


@dataclass(eq=False)
class PendingGradient:
    """One gradient between ``compress`` and the end of its step.

    Attributes:
        entry: its parameter.
        held: the parameter's memory.
        grad: the flat gradient, not yet overwritten.
        shape: of the gradient.
        pairs: what was taken out of the memory.
        nonfinite: elements of the local gradient that were not finite.
        handle: of an asynchronous operation, or None.
        finished: whether the result is written; then ``rounding`` is what half precision kept.
    """

    entry: Entry
    held: BucketMemory
    grad: Tensor
    shape: torch.Size
    pairs: SparseGrad
    nonfinite: int
    handle: int | None = None
    finished: bool = False
    bad: bool = False
    rounding: SparseGrad | None = None


class CompressorCore:
    """Selection, memory and bookkeeping of a compression object for ``hvd.DistributedOptimizer``.

    Args:
        selector: what is sent of each parameter's gradient; at least one element of each.
        named_parameters: the ones given to the optimizer.
        memory: error feedback.
        nonfinite: ``"propagate"``, ``"skip"`` or ``"error"``: see :class:`commhooks.Reducer`.
        process_set: the one given to the optimizer.
        timeout_s: seconds until a missing rank is an error, where the wait is ours and not Horovod's.
    """

    def __init__(
        self,
        selector: Selector,
        named_parameters: Any,
        memory: Memory | None,
        nonfinite: str,
        process_set: Any,
        timeout_s: float,
    ) -> None:
        if nonfinite not in NONFINITE:
            raise ValueError(f"nonfinite must be one of {NONFINITE}, got {nonfinite!r}")
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be positive, got {timeout_s!r}")
        self.selector, self.memory = selector, ErrorFeedback() if memory is None else memory
        self.nonfinite, self.timeout_s, self._process_set = nonfinite, float(timeout_s), process_set
        self.table = ParameterTable(named_parameters)
        self.memory.table.names.update({entry.parameter: entry.name for entry in self.table.entries})
        self.last, self.current = StepFigures(), StepFigures()
        self.nonfinite_steps = 0
        self._pending: dict[Entry, PendingGradient] = {}
        self._name = f"commhooks.agreement.{next(_numbers[tuple(getattr(process_set, 'ranks', None) or ())])}"
        self._agreement: int | None = None  # handle of the exchange of settings
        self._agreed = False

    @property
    def process_set(self) -> Any:
        """The process set whose ranks take part."""
        return check_process_set(self._process_set)

    def begin(self, tensor: Tensor) -> PendingGradient:
        """Selects from the gradient ``tensor`` and its memory; the first call of a step ends the last one."""
        if tensor.is_sparse:
            raise ValueError(
                "sparse gradients are not supported (sparse_as_dense): use nn.Embedding(sparse=False)"
            )
        entry = self.table.find(tensor)
        if entry in self._pending:
            self.finish_step()
        self._start_agreement()
        flat = tensor.detach().reshape(-1)
        k = self.selector.k(flat.numel(), entry.step)
        held, _ = self.memory.for_bucket(Bucket(entry.index, flat, (entry.parameter,), (flat.numel(),)))
        with self.current.phase("select"):
            operands = self.memory.operands(held, flat, scale=None)
            selected = self.selector.select(operands, k, step=entry.step, mask_key=entry.mask_key)
            pairs = SparseGrad(selected.values, selected.indices, flat.numel())
            nonfinite = int(selected.report[1])
        self.current.dense_bytes += flat.numel() * flat.element_size()
        pending = PendingGradient(entry, held, flat, tensor.shape, pairs, nonfinite)
        self._pending[entry] = pending
        return pending

    def finish(
        self, pending: PendingGradient, rows: Tensor, indices: Tensor, factor: float, share: float, bad: bool
    ) -> Tensor:
        """The reduced gradient in the parameter's shape.

        Args:
            pending: from :meth:`begin`.
            rows: shape ``(m, k)`` float32; the sum of the rows times ``factor`` is the result.
            indices: shape ``(m, k)`` int32.
            factor: of the sum.
            share: units of the result that a rank's memory answers for: 1 for an average, P for a sum.
            bad: whether any rank voted non-finite.
        """
        result = torch.empty_like(pending.grad)
        pending.finished, pending.bad = True, bad
        if bad:
            self._throw_away(pending, result)
        else:
            with self.current.phase("write_back"):
                pending.rounding = write_sparse(result, rows, indices, factor, share)
        return result.view(pending.shape)

    def _throw_away(self, pending: PendingGradient, result: Tensor) -> None:
        self.memory.restore(pending.held, pending.pairs)
        self.memory.undo(pending.held, pending.grad, scale=None)
        self.current.nonfinite_buckets.append(pending.entry.index)
        text = f"{pending.entry.name}: {pending.nonfinite} non-finite gradient elements on this rank"
        if self.nonfinite == "skip":
            logger.warning("%s; its update is skipped on all ranks", text)
            result.zero_()
            return
        result.fill_(float("nan"))
        if self.nonfinite == "error":
            for other in self._pending.values():
                if not other.bad:
                    self.memory.restore(other.held, other.pairs)
            self._pending.clear()
            raise NonFiniteGradientError(f"rank {horovod().rank()}, {text}")

    def finish_step(self) -> None:
        """Ends the step: what was sent is final, or goes back when any gradient of the step was thrown away."""
        if not self._pending:
            return
        thrown_away = bool(self.current.nonfinite_buckets) and self.nonfinite != "skip"
        for pending in self._pending.values():
            if pending.bad:
                continue
            if thrown_away or not pending.finished:  # not finished: the user gave up on this step
                self.memory.restore(pending.held, pending.pairs)
            else:
                self.memory.mask_velocity(pending.held, pending.pairs)
                if pending.rounding is not None:
                    self.memory.restore(pending.held, pending.rounding)
        self._pending.clear()
        self.nonfinite_steps += bool(self.current.nonfinite_buckets)
        self.last, self.current = self.current, StepFigures()

    def settings(self) -> str:
        """All that ranks must share, in one line."""
        names = sorted((e.name, tuple(e.parameter.shape), str(e.parameter.dtype)) for e in self.table.entries)
        digest = hashlib.blake2b(repr(names).encode(), digest_size=8).hexdigest()
        steps = hashlib.blake2b(repr(self.steps()).encode(), digest_size=4).hexdigest()
        return (
            f"{self.selector!r} | {self.memory.describe()} | nonfinite={self.nonfinite} "
            f"parameters={len(names)} names={digest} steps={steps}"
        )

    def stats(self) -> dict[str, Any]:
        """Figures of the last step on this rank: bytes, compression ratio, residual norm, seconds."""
        self._finish_if_landed()
        last, sent = self.last, max(1, self.last.bytes_sent)
        return {
            "step": max(entry.step for entry in self.table.entries),
            "bytes_sent": last.bytes_sent,
            "bytes_received": last.bytes_received,
            "dense_bytes": last.dense_bytes,
            "compression_ratio": last.dense_bytes / sent if last.bytes_sent else float("inf"),
            "residual_norm": self.memory.table.residual_norm(),
            "nonfinite_steps": self.nonfinite_steps,
            "seconds": dict(last.seconds),
        }

    def state_dict(self) -> dict[str, Any]:
        """This rank's memory and step counts by parameter name; call it between steps and save one per rank."""
        self._finish_if_landed()
        return {"version": 1, "steps": self.steps(), **self.memory.table.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads what this rank's :meth:`state_dict` gave."""
        self._pending.clear()
        self.load_steps(state["steps"])
        self.memory.table.load(state)

    def load_steps(self, steps: dict[str, int]) -> None:
        """Takes over another rank's step counts (elastic), and compares settings anew at the next step."""
        for entry in self.table.entries:
            entry.step = int(steps.get(entry.name, entry.step))
        self._agreed, self._agreement = False, None

    def steps(self) -> dict[str, int]:
        """Step counts by parameter name."""
        return {entry.name: entry.step for entry in sorted(self.table.entries, key=lambda e: e.name)}

    def _finish_if_landed(self) -> None:
        if all(pending.finished for pending in self._pending.values()):
            self.finish_step()

    def _start_agreement(self) -> None:
        """Sends the settings; the answer is read in :meth:`check_agreement`, before any data is used.

        Waiting here, inside backward, could deadlock with collectives of the model's own (SyncBatchNorm).
        """
        if self._agreed or self._agreement is not None:
            return
        hvd = horovod()
        text = torch.zeros(_AGREEMENT_BYTES, dtype=torch.uint8)
        settings = self.settings()  # may be longer than the message: a digest of the whole stands first
        digest = hashlib.blake2b(settings.encode(), digest_size=8).hexdigest()
        encoded = f"{digest}: {settings}".encode()[:_AGREEMENT_BYTES]
        text[: len(encoded)] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
        self._agreement = hvd.allgather_async(text, name=self._name, process_set=self.process_set)

    def check_agreement(self) -> None:
        """Raises ``SettingsMismatchError`` on every rank when two ranks differ."""
        if self._agreed or self._agreement is None:
            return
        handle, self._agreement = self._agreement, None
        what = "agreement on settings (is process_set the optimizer's?)"
        everyone = wait_for(handle, self.timeout_s, what).view(-1, _AGREEMENT_BYTES)
        for rank in range(1, everyone.shape[0]):
            if not torch.equal(everyone[rank], everyone[0]):
                raise SettingsMismatchError(
                    f"rank 0 has [{_readable(everyone[0])}], but rank {rank} has [{_readable(everyone[rank])}]"
                )
        self._agreed = True


def _readable(text: Tensor) -> str:
    return bytes(text.tolist()).rstrip(b"\0").decode(errors="replace")
