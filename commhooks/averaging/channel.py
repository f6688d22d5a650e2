"""An averager's transport: opened late, with sum, mean and broadcast of tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import CommHooksError
from ..transports import Connection, Transport
from .flat import as_bytes, split

TAG = 7000  # averagers have a transport of their own; the tag only tells their calls from each other
_BROADCAST_BYTES = 64 << 20


@contextmanager
def reporting(*used: Transport) -> Iterator[None]:
    """Reports an error inside the block to the transports: an MPI process must then leave by Abort."""
    try:
        yield
    except CommHooksError as error:
        for transport in used:
            transport.fail(error)
        raise


class Channel:
    """A transport that opens when the device of the model is known, and collectives over it.

    Args:
        transport: a name or a ready transport.
        timeout_s: seconds until a stalled peer is an error. None: the process group's, or 300 s.
        process_group: whose ranks take part, for ``"distributed"``. None: all.
        device_type: the device it sends from. None: that of the first tensors that :meth:`open_for` gets.
    """

    def __init__(
        self,
        transport: str | Transport,
        timeout_s: float | None,
        process_group: dist.ProcessGroup | None,
        device_type: str | None,
    ) -> None:
        self._connection = Connection(transport)
        self._timeout_s, self._process_group, self._device_type = timeout_s, process_group, device_type

    @property
    def is_open(self) -> bool:
        """Whether the transport is open."""
        return self._connection.is_open

    @property
    def transport(self) -> Transport:
        """The open transport. The first use is a collective call that opens it."""
        return self._connection.open(
            timeout_s=self._timeout_s,
            process_group=self._process_group,
            device_type=self._device_type or "cpu",
        )

    def open_for(self, tensors: Sequence[Tensor]) -> Transport:
        """Opens the transport, where it is not open yet, for the device of these tensors."""
        if self._device_type is None and tensors:
            self._device_type = tensors[0].device.type
        return self.transport

    def total(self, flat: Tensor, what: str) -> Tensor:
        """Returns the sum over ranks of ``flat`` (overwritten)."""
        self.transport.all_reduce(flat, tag=TAG + 1, what=what)
        return flat

    def mean(self, flat: Tensor, what: str, share: float | None = None) -> Tensor:
        """Returns the mean over ranks of ``flat`` (overwritten), or ``sum_p share_p * flat_p``.

        All ranks get the same bits. A share of 0 sends zeros, whatever ``flat`` holds.
        """
        if share is None:
            return self.total(flat, what).div_(self.transport.world_size)
        return self.total(flat.mul_(share) if share != 0.0 else flat.zero_(), what)

    def broadcast(self, tensors: Sequence[Tensor], root: int, what: str) -> None:
        """Overwrites the tensors, of any dtype and device, with rank ``root``'s, in batches."""
        batch: list[Tensor] = []
        for position, tensor in enumerate(tensors, start=1):
            batch.append(tensor)
            if position == len(tensors) or sum(t.nbytes for t in batch) >= _BROADCAST_BYTES:
                self._broadcast(batch, root, what)
                batch = []

    def _broadcast(self, batch: Sequence[Tensor], root: int, what: str) -> None:
        sent = torch.cat([as_bytes(t).to(batch[0].device) for t in batch])
        self.transport.broadcast(sent, root=root, tag=TAG + 2, what=what)
        for target, piece in zip(batch, split(sent, [t.nbytes for t in batch]), strict=True):
            target.detach().copy_(piece.clone().view(target.dtype).view(target.shape))

    def close(self) -> None:
        """Closes the transport, if it is open."""
        self._connection.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Channel:
        """Returns itself: a connection to other processes cannot be copied."""
        return self
