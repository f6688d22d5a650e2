"""What all averagers share: step count, agreement between ranks, the mean of one flat message, state."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.model_averaging.averagers import ModelAverager

from .. import transports
from ..errors import CommHooksError
from ..exchange.agreement import agree
from ..gradient.bucket import Bucket
from ..transports.base import Transport
from .flat import digest_of, flatten, message_dtype, parameters_of, shown_layout, unflatten_

if TYPE_CHECKING:
    from ..reduction.reducer import Reducer

logger = logging.getLogger(__name__)

BufferChoice = Literal["average", "broadcast", "leave"]
_TAG = 7000  # averagers have a transport of their own; the tag only tells their calls from each other
_ADVICE = {"starting point": ": call broadcast_parameters first, or load the averagers' states"}


@contextmanager
def reporting(*used: Transport) -> Iterator[None]:
    """Tells the transports of an error inside it: an MPI process must then leave by Abort, not by Finalize."""
    try:
        yield
    except CommHooksError as error:
        for transport in used:
            transport.fail(error)
        raise


class Averager(ModelAverager):
    """Base of the averagers: call :meth:`average_parameters` once after every local optimizer step, on every
    rank.

    All synchronise *after* steps K, 2K, ... (torch's ``PeriodicModelAverager`` also does so at its very first
    call). Before each synchronisation the ranks compare a small header (settings, shapes, step, and at the
    first one the starting point where the averager remembers it), so that ranks that run different code, or
    different numbers of steps, end with :class:`~commhooks.errors.SettingsMismatchError`.

    Args:
        transport: ``"distributed"``, ``"mpi"`` or a :class:`~commhooks.transports.base.Transport`.
        module: the model whose buffers (BatchNorm statistics) are looked after; without it buffers are left
            alone.
        buffers: ``"average"`` (default: the floating ones, by the mean over ranks; integers such as
            ``num_batches_tracked`` stay), ``"broadcast"`` (all become rank 0's) or ``"leave"``.
        reducer: compresses what is sent: the model's change since the last synchronisation goes through it,
            with error feedback, in place of the model. Belongs to this averager alone.
        timeout_s: for a transport given by name: seconds until a stalled peer is an error. None: the process group's timeout,
            or 300 s without a group.
        process_group: for ``"distributed"``: whose ranks average, in a new group of ours; default: all.
        device_type: ``"cuda"`` lets ``"distributed"`` use NCCL; otherwise CUDA models go through host memory.

    Attributes:
        step: local steps so far (calls of :meth:`average_parameters`).
        synchronisations: averagings so far.

    Raises:
        ValueError: an argument out of range, with its name and value.
    """

    def __init__(
        self,
        *,
        transport: str | Transport = "distributed",
        module: torch.nn.Module | None = None,
        buffers: BufferChoice = "average",
        reducer: Reducer | None = None,
        timeout_s: float | None = None,
        process_group: dist.ProcessGroup | None = None,
        device_type: str = "cpu",
    ) -> None:
        # not super().__init__: it asks for a torch.distributed group, which "mpi" and in_process do without
        if buffers not in ("average", "broadcast", "leave"):
            raise ValueError(f"buffers must be 'average', 'broadcast' or 'leave', got {buffers!r}")
        self.process_group = process_group  # type: ignore[assignment]
        self.transport = transports.make(
            transport, timeout_s=timeout_s, process_group=process_group, device_type=device_type
        )
        self.module, self.buffers, self.reducer = module, buffers, reducer
        self.step = 0
        self.synchronisations = 0
        self._members: list[Tensor] = []  # in the order of what is remembered of them
        self._start = 0  # fingerprint of the starting point; 0: none, or found equal on all ranks

    @property
    def rank(self) -> int:
        """This worker's rank."""
        return self.transport.rank

    @property
    def world_size(self) -> int:
        """Number of workers P."""
        return self.transport.world_size

    def average_parameters(self, params: Iterable[Tensor] | Iterable[dict[str, Any]]) -> None:
        """Counts one local step and synchronises when it is time to. Overwrites the parameters in place then.

        Args:
            params: the model's parameters or the optimizer's parameter groups, the same on every call and
                rank. Parameters whose ``grad`` is None take part; those with ``requires_grad=False`` do not.

        Raises:
            PeerTimeoutError, PeerLostError: a peer is stalled or gone; the message names it and the step.
            SettingsMismatchError: ranks disagree on settings, shapes or the number of steps.
        """
        self.step += 1
        if self.is_due(self.step):
            self.synchronise(params)

    def synchronise(self, params: Iterable[Tensor] | Iterable[dict[str, Any]]) -> None:
        """Synchronises now, whatever the step: after the last one, say, when it was not in the set."""
        tensors = self._in_order(parameters_of(params))
        with self._reporting():
            self._synchronise(tensors)
        self.synchronisations += 1
        logger.debug("%s: synchronised after step %d", type(self).__name__, self.step)

    @abstractmethod
    def is_due(self, step: int) -> bool:
        """Whether to synchronise after local step ``step`` (from 1)."""

    @abstractmethod
    def settings(self) -> str:
        """What all ranks must have in common, as text."""

    @abstractmethod
    def _synchronise(self, tensors: list[Tensor]) -> None: ...

    def broadcast_parameters(
        self, params: Iterable[Tensor] | Iterable[dict[str, Any]], root: int = 0
    ) -> None:
        """Makes all ranks start from rank ``root``'s parameters (and the module's buffers), as DDP does."""
        tensors = self._in_order(parameters_of(params))
        with torch.no_grad(), self._reporting():
            for tensor in [*tensors, *self._buffers(floating=False)]:
                self._broadcast(tensor, root)
        self._start_from(tensors)

    def consensus_distance(self, params: Iterable[Tensor] | Iterable[dict[str, Any]]) -> float:
        """``sqrt(mean_p ||x_p - mean x||^2)`` over the ranks' parameters; costs one all-reduce."""
        tensors = parameters_of(params)
        own = flatten(tensors, torch.float64)
        with self._reporting():
            mean = self._mean(own.clone(), "consensus distance")
            squared = self._mean((own - mean).square().sum().reshape(1), "consensus distance")
        return float(torch.sqrt(squared))

    def close(self) -> None:
        """Frees the transport. Call it on all ranks."""
        self.transport.close()

    # -- pieces the algorithms are made of -------------------------------------------------------------------

    def _reporting(self) -> AbstractContextManager[None]:
        used = [self.transport]
        if self.reducer is not None and self.reducer.connection.is_open:
            used.append(self.reducer.transport)
        return reporting(*used)

    def _what(self) -> str:
        return f"{type(self).__name__} after step {self.step}"

    def _agree(self, tensors: Sequence[Tensor], note: float = 0.0) -> list[float]:
        """Compares settings, shapes and step with every rank; returns the ranks' ``note``s in order."""
        notes = agree(
            self.transport, self._common(tensors), tag=_TAG, what=self._what(), advice=_ADVICE, note=note
        )
        self._start = 0
        return notes

    def _common(self, tensors: Sequence[Tensor]) -> dict[str, object]:
        """What the ranks must have in common at this synchronisation."""
        return {
            "averager": type(self).__name__,
            "step": self.step,
            "settings": self.settings(),
            "parameter shapes": shown_layout(tensors),
            "buffers": f"{self.buffers}: {shown_layout(self._buffers())}",
            "starting point": f"{self._start:x}",
        }

    def _in_order(self, tensors: list[Tensor]) -> list[Tensor]:
        """The order the averager was made with: an optimizer's groups may have another than the model."""
        place = {id(tensor): i for i, tensor in enumerate(self._members)}
        if any(id(tensor) not in place for tensor in tensors):
            return tensors
        return sorted(tensors, key=lambda tensor: place[id(tensor)])

    def _start_from(self, tensors: Sequence[Tensor]) -> None:
        """Takes ``tensors`` for the starting point, in an averager that sends the change since the last one."""

    def _check_start(self, *anchors: Tensor) -> None:
        """Lets the next agreement compare these tensors, which all ranks must have in common."""
        self._start = digest_of(anchors)

    def _buffers(self, floating: bool = True) -> list[Tensor]:
        """The buffers looked after; with ``floating`` only those an average makes sense for."""
        if self.module is None or self.buffers == "leave":
            return []
        found = [b for b in self.module.buffers() if b is not None]
        return (
            [b for b in found if b.is_floating_point()] if floating and self.buffers == "average" else found
        )

    def _synchronise_buffers(self, scale: float | None = None) -> None:
        """Averages the floating buffers (with this rank's ``scale``, else plainly) or broadcasts all."""
        tensors = self._buffers()
        if not tensors:
            return
        if self.buffers == "broadcast":
            with torch.no_grad():
                for tensor in tensors:
                    self._broadcast(tensor, root=0)
            return
        flat = flatten(tensors, message_dtype(tensors))
        unflatten_(tensors, self._mean(flat, f"{self._what()}, buffers", scale))

    def _mean(self, flat: Tensor, what: str, scale: float | None = None) -> Tensor:
        """Mean over ranks of ``flat`` (overwritten), or ``sum_p scale_p * flat_p``; same bits everywhere."""
        if scale is not None:
            flat.mul_(scale)
        self.transport.all_reduce(flat, tag=_TAG + 1, what=what)
        return flat if scale is not None else flat.div_(self.world_size)

    def _broadcast(self, tensor: Tensor, root: int) -> None:
        sent = tensor.detach().contiguous()
        self.transport.broadcast(sent, root=root, tag=_TAG + 2, what=f"{self._what()}, broadcast")
        tensor.copy_(sent)

    def _reduce(
        self, index: int, flat: Tensor, tensors: Sequence[Tensor], kind: str, is_last: bool
    ) -> Tensor:
        """``flat`` (the change of ``tensors``) becomes the mean of what the ranks contributed of it.

        The reducer's memory knows the tensors as ``"parameter 0"``, ... by position, so that it can be saved.
        """
        if self.reducer is None:
            raise RuntimeError(f"{type(self).__name__} has no reducer")
        keys = tuple(f"{kind} {i}" for i in range(len(tensors)))
        numels = tuple(t.numel() for t in tensors)
        self.reducer.reduce(Bucket(index=index, buffer=flat, keys=keys, numels=numels, is_last=is_last))
        return flat

    # -- state -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """This rank's state: the counts, the algorithm's own tensors (copies) and the reducer's memory.

        Save it with the model's and the optimizer's on every rank: loaded together at the same world size
        they continue bit for bit. For another world size see
        :func:`~commhooks.averaging.average_checkpoints`.
        """
        state: dict[str, Any] = {
            "step": self.step,
            "synchronisations": self.synchronisations,
            "rank": self.rank,
            "world_size": self.world_size,
            "shared": self._shared_state(),
            "reducers": None if self.reducer is None else [self.reducer.state_dict()],
        }
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a state of this rank at this world size, or one that ``average_checkpoints`` made.

        Raises:
            ValueError: the state is another rank's, or of another world size and not averaged.
        """
        saved = (state["rank"], state["world_size"])
        if saved not in ((self.rank, self.world_size), (None, None)):
            raise ValueError(
                f"state is of rank {saved[0]} of {saved[1]}, this is rank {self.rank} of {self.world_size}: "
                f"load each rank's own, or join all of them with average_checkpoints"
            )
        self.step, self.synchronisations = state["step"], state["synchronisations"]
        self._load_shared_state(state["shared"])
        if self.reducer is not None and state["reducers"] is not None:
            reducers = state["reducers"]
            self.reducer.load_state_dict(reducers[0] if saved != (None, None) else reducers)

    def _shared_state(self) -> dict[str, Any]:
        """State that is the same on every rank, as new tensors and numbers."""
        return {}

    def _load_shared_state(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(f"{type(self).__name__} has no shared state, got {sorted(state)}")
