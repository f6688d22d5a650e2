"""Moving pairs between the device of the gradients and the device a transport can send from."""

from __future__ import annotations

import torch
from torch import Tensor

from .sparse import SparseGrad
from .transports import Transport


def to_transport(pairs: SparseGrad, transport: Transport) -> SparseGrad:
    """``pairs`` where ``transport`` can send them; from a GPU through pinned memory, by this stream."""
    device = pairs.values.device
    if device.type == transport.device_type:
        return pairs
    if device.type != "cuda":
        return pairs.to(torch.device(transport.device_type))
    staged = SparseGrad(_pinned(pairs.values), _pinned(pairs.indices), pairs.numel)
    torch.cuda.current_stream(device).synchronize()
    return staged


def _pinned(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
