"""What both compressors share: memory per parameter, agreement of the ranks, the step's bookkeeping."""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ddp.recipe import check_moved
from ..errors import NonFiniteGradientError
from ..exchange.agreement import MESSAGE_BYTES, compare, encode
from ..gradient.bucket import Bucket
from ..gradient.sparse_grad import SparseGrad
from ..memory import Memory
from ..memory.parameter_memory import VERSION
from ..memory.resharding import check_entries
from ..memory.single_user import claim
from ..reduction.checkpoint import check_fits, description, in_units_of
from ..reduction.routes import SparseRoute
from ..reduction.step import Kept, Step
from ..schemes import UNSET, chosen_memory
from ..selection.selectors import Selector
from ..transports import check_timeout, default_timeout
from ..wire.message import Context
from .api import check_process_set, horovod, wait_for
from .parameters import SCALER_ORDER, Entry, ParameterTable
from .unused_averages import UnusedAverages

# Compressions of one process set are made in the same order on all its ranks.
_numbers: dict[Any, Iterator[int]] = defaultdict(itertools.count)


@dataclass(eq=False)
class PendingGradient:
    """One gradient between ``compress`` and ``decompress``.

    Attributes:
        entry: its parameter.
        shape: of the gradient.
        route: gradient, memory and pairs.
        grad: shape ``(n,)``, the gradient: a view of it where it is contiguous.
        bits: of its elements where pairs were selected, at ``compress``.
        kept: the step's record of it. A gradient that never comes to ``decompress`` is rolled back.
        handle: of the all-gather (top-k), or None.
    """

    entry: Entry
    shape: torch.Size
    route: SparseRoute
    kept: Kept
    grad: Tensor
    bits: Tensor
    handle: int | None = None


class CompressorCore:
    """Selection, memory and bookkeeping of a compression object for ``hvd.DistributedOptimizer``.

    Args:
        selector: what is sent of each parameter's gradient: at least one element of each.
        named_parameters: the ones given to the optimizer.
        memory: what is withheld. None: ``ErrorFeedback()``.
        nonfinite: ``"propagate"``, ``"skip"`` or ``"error"``: see :class:`commhooks.Reducer`.
        process_set: the one given to the optimizer.
        timeout_s: seconds until a missing rank is an error, in the waits of commhooks, not in Horovod's.
            None: the default process group's timeout, or 300 s without a group.

    Attributes:
        moved: the optimizer's settings that were moved into the memory, or None.

    Raises:
        TypeError: ``memory`` is not a ``Memory``.
        ValueError: a parameter's name comes twice, the policy is unknown, ``timeout_s`` is not positive, or
            another state or compression has the memory.
    """

    def __init__(
        self,
        selector: Selector,
        named_parameters: Any,
        memory: Memory | None,
        nonfinite: str,
        process_set: Any,
        timeout_s: float | None,
    ) -> None:
        self.step = Step(nonfinite)
        self.timeout_s = default_timeout() if timeout_s is None else check_timeout(timeout_s)
        self.selector, self.memory = selector, chosen_memory(UNSET if memory is None else memory)
        self._process_set = process_set
        self.table = ParameterTable(named_parameters)
        self.memory.table.names.update({entry.parameter: entry.name for entry in self.table.entries})
        self.moved: dict[str, object] | None = None
        self._unused = UnusedAverages(self.table)
        self._begun: set[Entry] = set()  # parameters whose gradients are in the present step
        self._name = f"commhooks.{next(_numbers[_key(process_set)])}"
        self._agreement: int | None = None  # handle of the exchange of settings
        self._agreed = False
        claim(self.memory, self, "memory", "state, compression or Reducer")

    @property
    def process_set(self) -> Any:
        """The process set whose ranks take part."""
        return check_process_set(self._process_set)

    def name_of(self, entry: Entry) -> str:
        """Returns the name of the operation that exchanges a parameter's pairs.

        Two compressions may serve models whose parameters have equal names.
        """
        return f"{self._name}.topk.{entry.name}"

    def begin(self, tensor: Tensor) -> PendingGradient:
        """Selects what is sent of a gradient and its memory.

        A parameter that comes a second time begins a new step, so the step before it is ended here.

        Args:
            tensor: the gradient, dense. It is not changed.

        Raises:
            ValueError: it is sparse, or the gradient of no parameter.
        """
        if tensor.is_sparse:
            raise ValueError(
                "sparse gradients are not supported (sparse_as_dense): use nn.Embedding(sparse=False)"
            )
        entry = self.table.find(tensor)
        if entry in self._begun:
            self.finish_step()
        self._unused.reached(entry)
        self._start_agreement()
        flat = tensor.detach().reshape(-1)
        bucket = Bucket(entry.index, flat, (entry.parameter,), (flat.numel(),))
        held, _ = self.memory.for_bucket(bucket)
        operands = self.memory.operands(held, bucket, scale=None)
        k = self.selector.k(flat.numel(), entry.step)
        context = Context(entry.index, entry.step, self.selector.k(flat.numel(), entry.step + 1))
        route = SparseRoute(self.memory, held, operands, context, self.selector, k, entry.mask_key)
        with self.step.figures.phase("select"):
            route.correct()
        self.step.figures.add(misses=route.misses, dense_bytes=flat.numel() * flat.element_size())
        self._begun.add(entry)
        kept, bits = self.step.keep(None, route.rollback), _bits_at(flat, route.pairs)
        return PendingGradient(entry, tensor.shape, route, kept, flat, bits)

    def finish(
        self, pending: PendingGradient, rows: Tensor, indices: Tensor, factor: float, share: float, bad: bool
    ) -> Tensor:
        """Returns the reduced gradient in the parameter's shape.

        Args:
            pending: from :meth:`begin`.
            rows: shape ``(m, k)`` float32. The sum of the rows times ``factor`` is the result.
            indices: shape ``(m, k)`` int32.
            factor: of the sum.
            share: 1 for an average, P for a sum: the result is so many times the ranks' average. The memory
                needs it to take back what rounding kept.
            bad: whether any rank voted non-finite.

        Raises:
            NonFiniteGradientError: ``bad``, under the policy ``"error"``.
            RuntimeError: the gradient was changed since its backward pass, by a GradScaler's ``step`` for
                example. The change would be lost.
        """
        route = pending.route
        if not torch.equal(_bits_at(pending.grad, route.pairs), pending.bits):
            raise RuntimeError(
                f"the gradient of {pending.entry.name} was changed between backward() and synchronize(): "
                f"that would be lost. The order is: {SCALER_ORDER}"
            )
        result = torch.empty_like(route.operands.grad, dtype=pending.entry.parameter.dtype)
        if bad:
            route.take_back()
            pending.kept.settle()
            self._throw_away(pending, result)
        else:
            route.receive(rows, indices)
            with self.step.figures.phase("write_back"):
                route.write(result, factor, share)
            pending.kept.use(route.commit)
            self._unused.written(pending.entry)
        return result.view(pending.shape)

    def _throw_away(self, pending: PendingGradient, result: Tensor) -> None:
        text = f"{pending.entry.name}: {pending.route.bad} non-finite gradient elements on this rank"
        try:
            self.step.throw_away(result, pending.entry.index, text, horovod().rank())
        except NonFiniteGradientError:
            self._begun.clear()
            raise

    def finish_step(self) -> None:
        """Ends the step: what was sent is committed, or rolled back if any gradient was thrown away.

        A gradient whose result was never asked for (the user gave up on the step) is rolled back too.
        """
        if self._begun:
            self._begun.clear()
            self.step.finish()
            if self.step.last.nonfinite_buckets:
                self._unused.forgive()

    def count(self, bytes_each_way: int) -> None:
        """Adds traffic to the figures of the step under way."""
        self.step.figures.add(sent=bytes_each_way, received=bytes_each_way)

    def settings(self) -> dict[str, object]:
        """Returns all settings that must be the same on all ranks, by name."""
        names = sorted((e.name, tuple(e.parameter.shape), str(e.parameter.dtype)) for e in self.table.entries)
        return {
            **self.selector.settings(),
            "selector": type(self.selector).__name__,
            "memory": type(self.memory).__name__,
            **self.memory.settings(),
            "nonfinite": self.step.nonfinite,
            "parameters": f"{len(names)} (checksum {_checksum(names)})",
            "steps of the parameters": f"up to {self.last_step} (checksum {_checksum(self.steps())})",
        }

    @property
    def last_step(self) -> int:
        """The largest step count of any parameter."""
        return max(entry.step for entry in self.table.entries)

    def stats(self) -> dict[str, Any]:
        """Figures of the last step on this rank: bytes, compression ratio, residual norm, seconds."""
        self._finish_if_complete()
        residual_norm = self.memory.table.residual_norm()
        return {"step": self.last_step, **self.step.stats(), "residual_norm": residual_norm}

    def state_dict(self) -> dict[str, Any]:
        """Returns this rank's memory and step counts by name. Call it between steps. Save one per rank."""
        self._finish_if_complete()
        moved = {} if self.moved is None else {"moved": dict(self.moved)}
        made_by = description(self.selector, "Horovod", self.memory)
        return {"steps": self.steps(), "scheme": made_by, **self.memory.table.state_dict(), **moved}

    def load_state_dict(self, state: dict[str, Any], strict: bool = True) -> None:
        """Loads what this rank's :meth:`state_dict` gave. ``strict`` as for ``SparseState``.

        Raises:
            ValueError: ``state`` is something else, its memory does not fit, or it moved other settings.
        """
        check_entries(state, ("steps", "residual", "velocity"))
        check_moved(state, self.moved)
        check_fits(state, self.selector, self.memory, strict)
        state = in_units_of(self.memory, state)
        self._begun.clear()
        self.step.forget()
        self.load_steps(state["steps"])
        self.memory.table.load({**state, "version": VERSION})  # version 1 of these had the same order

    def load_steps(self, steps: dict[str, int]) -> None:
        """Takes over step counts by name (elastic). Settings are compared anew at the next step."""
        for entry in self.table.entries:
            entry.step = int(steps.get(entry.name, entry.step))
        self._unused.forgive()
        self._agreed, self._agreement = False, None

    def steps(self) -> dict[str, int]:
        """Returns the step counts by parameter name."""
        return {entry.name: entry.step for entry in sorted(self.table.entries, key=lambda e: e.name)}

    def _finish_if_complete(self) -> None:
        if self.step.is_complete:
            self.finish_step()

    def _start_agreement(self) -> None:
        """Starts to gather the ranks' settings. :meth:`check_agreement` reads them before data is used.

        Waiting here, inside backward, could deadlock with collectives of the model's own (SyncBatchNorm).
        """
        if not self._agreed and self._agreement is None:
            message = encode(self.settings())
            self._agreement = horovod().allgather_async(
                message, name=f"{self._name}.agreement", process_set=self.process_set
            )

    def check_agreement(self) -> None:
        """Raises ``SettingsMismatchError`` on every rank when two ranks differ."""
        if self._agreed or self._agreement is None:
            return
        handle, self._agreement = self._agreement, None
        what = "agreement on settings (is process_set the optimizer's?)"
        messages = wait_for(handle, self.timeout_s, what).view(-1, MESSAGE_BYTES)
        compare(messages, horovod().rank(), "compression", ranks=self.process_set.ranks)
        self._agreed = True


def _key(process_set: Any) -> tuple[int, ...]:
    """Tells process sets apart. None means the global one."""
    if process_set is None or process_set is horovod().global_process_set:
        return ()
    return tuple(getattr(process_set, "ranks", None) or ())


def _bits_at(grad: Tensor, pairs: SparseGrad) -> Tensor:
    """Returns the bits of the gradient's elements at the places of ``pairs``.

    A GradScaler's ``unscale_`` does not count up the gradient's version, so that values are compared.
    """
    elements = grad.index_select(0, pairs.indices[pairs.used].long())
    return elements.view(torch.int32 if grad.element_size() == 4 else torch.int16)


def _checksum(value: object) -> str:
    return hashlib.blake2b(repr(value).encode(), digest_size=8).hexdigest()
