"""Parameters, momentum buffers and module buffers as one flat message."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def parameters_of(params: Iterable[Tensor] | Iterable[dict[str, Any]]) -> list[Tensor]:
    """The tensors of ``model.parameters()`` or of an optimizer's ``param_groups``, in order.

    Unlike torch's ``get_params_to_average`` it keeps parameters whose ``grad`` is None: they may have one on
    another rank, and a rank that left them out would shift everybody else's message. Parameters with
    ``requires_grad=False`` are left out: nothing moves them.

    Raises:
        TypeError: an element is neither a tensor nor a parameter group.
    """
    tensors: list[Tensor] = []
    for element in params:
        if isinstance(element, Tensor):
            tensors.append(element)
        elif isinstance(element, dict):
            tensors.extend(element["params"])
        else:
            raise TypeError(f"params must hold tensors or parameter groups, got {type(element).__name__}")
    return [tensor for tensor in tensors if tensor.requires_grad]


def message_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """float64 when any tensor is float64, else float32: sums in half precision would lose what is averaged.

    Raises:
        ValueError: a tensor is not real floating point.
    """
    for tensor in tensors:
        if not tensor.is_floating_point():
            raise ValueError(f"only floating-point tensors can be averaged, got {tensor.dtype}")
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def flatten(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """A new contiguous ``(n,)`` tensor with all tensors' elements, in order, on the first one's device."""
    if not tensors:
        return torch.empty(0, dtype=dtype)
    device = tensors[0].device
    return torch.cat([t.detach().reshape(-1).to(device=device, dtype=dtype) for t in tensors])


def unflatten_(tensors: Sequence[Tensor], flat: Tensor) -> None:
    """Writes ``flat`` back into the tensors in place (storages stay), rounding to their dtype."""
    offset = 0
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(flat[offset : offset + tensor.numel()].view(tensor.shape))
            offset += tensor.numel()


def numel_of(tensors: Iterable[Tensor]) -> int:
    """Elements of all tensors together."""
    return sum(t.numel() for t in tensors)


def digest(*parts: object) -> int:
    """A signed 64-bit fingerprint of the parts' text, equal on every rank and in every process."""
    text = "\x1f".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def digest_of(tensors: Iterable[Tensor]) -> int:
    """A signed 64-bit fingerprint of the tensors' bits; reads them on the host."""
    state = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        state.update(tensor.detach().cpu().contiguous().numpy().data)
    return int.from_bytes(state.digest(), "little", signed=True)


def shown_layout(tensors: Sequence[Tensor]) -> str:
    """What two ranks must share before their messages can be added up, in short, with a checksum of shapes
    and dtypes.
    """
    layout = ";".join(f"{tuple(t.shape)}{t.dtype}" for t in tensors)
    checksum = hashlib.blake2b(layout.encode(), digest_size=6).hexdigest()
    return f"{numel_of(tensors)} elements in {len(tensors)} tensors (checksum {checksum})"
