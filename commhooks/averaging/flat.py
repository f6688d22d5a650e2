"""Packs tensors into one flat message and back, and makes fingerprints of tensors.

A complex tensor counts as its real and imaginary parts: it has twice as many elements in a message.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]]
"""``model.parameters()`` or ``optimizer.param_groups``."""


def tensors_of(params: Parameters) -> list[Tensor]:
    """Returns the tensors of ``model.parameters()`` or an optimizer's ``param_groups``, in order, each once.

    Unlike torch's ``get_params_to_average`` it keeps parameters whose ``grad`` is None. Such a parameter may
    have a gradient on another rank, and the messages of the two ranks would then differ in layout.

    Raises:
        TypeError: an element is neither a tensor nor a parameter group.
        ValueError: there is no tensor.
    """
    found: dict[int, Tensor] = {}
    for element in params:
        if isinstance(element, Tensor):
            found.setdefault(id(element), element)
        elif isinstance(element, dict):
            for tensor in element["params"]:
                found.setdefault(id(tensor), tensor)
        else:
            raise TypeError(f"params must hold tensors or parameter groups, got {type(element).__name__}")
    if not found:
        raise ValueError(
            "params must hold at least one tensor, got none: a generator such as model.parameters() is "
            "empty at its second use, so pass a new one at each call, or a list"
        )
    return list(found.values())


def trainable(params: Parameters) -> list[Tensor]:
    """Returns those of :func:`tensors_of` that require a gradient."""
    return [tensor for tensor in tensors_of(params) if tensor.requires_grad]


def real_view(tensor: Tensor) -> Tensor:
    """Returns a view without graph. A complex tensor gets a last dimension of 2 for its two parts."""
    tensor = tensor.detach()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def message_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """Returns the dtype of a message: float64 when any tensor has 64 bits a number, else float32.

    Half precision is never used, since its sums round too much.

    Raises:
        ValueError: a tensor is neither floating point nor complex.
    """
    for tensor in tensors:
        if not (tensor.is_floating_point() or tensor.is_complex()):
            raise ValueError(f"only floating-point and complex tensors can be averaged, got {tensor.dtype}")
    wide = any(t.dtype in (torch.float64, torch.complex128) for t in tensors)
    return torch.float64 if wide else torch.float32


def flatten(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Returns a new contiguous ``(n,)`` tensor with all numbers in order, on the first tensor's device."""
    if not tensors:
        return torch.empty(0, dtype=dtype, device="cpu")
    device = tensors[0].device
    return torch.cat([real_view(t).reshape(-1).to(device=device, dtype=dtype) for t in tensors])


def unflatten_(tensors: Sequence[Tensor], flat: Tensor) -> None:
    """Overwrites the tensors in place with ``flat`` ``(n,)``, rounded to their dtype. Storages stay."""
    with torch.no_grad():
        for tensor, piece in zip(tensors, pieces(flat, tensors), strict=True):
            target = real_view(tensor)
            target.copy_(piece.view(target.shape))


def pieces(flat: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Views of ``flat``, one ``(n_i,)`` for each of the tensors that it was made from."""
    return split(flat, [numel(t) for t in tensors])


def split(flat: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Views of ``flat``, one after the other, of these sizes."""
    return torch.split(flat, list(sizes))


def numel(tensor: Tensor) -> int:
    """Returns how many numbers a tensor has in a message: a complex element counts as two."""
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def numel_of(tensors: Iterable[Tensor]) -> int:
    """Returns how many numbers all tensors together have in a message."""
    return sum(numel(t) for t in tensors)


def digest(*parts: object) -> int:
    """Returns a signed 64-bit fingerprint of the parts' text, equal on every rank and in every process."""
    text = "\x1f".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def digest_of(tensors: Iterable[Tensor]) -> int:
    """Returns a signed 64-bit fingerprint of the tensors' bits, which the host reads."""
    state = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        state.update(as_bytes(tensor.cpu()).numpy().data)
    return int.from_bytes(state.digest(), "little", signed=True)


def checksum(tensors: Sequence[Tensor]) -> int:
    """Returns a number that tells whether the bits of tensors have changed: their sum as integers."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    views = [real_view(tensor) for tensor in tensors]
    return sum(int(v.view(words[v.element_size()]).sum(dtype=torch.int64)) for v in views)


def as_bytes(tensor: Tensor) -> Tensor:
    """Returns the tensor's elements as ``(bytes,)`` uint8, of any dtype. A view where it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def shown_layout(tensors: Sequence[Tensor]) -> str:
    """Returns the layout, which ranks must share, as text: counts and a checksum of shapes and dtypes."""
    layout = ";".join(f"{tuple(t.shape)}{t.dtype}" for t in tensors)
    code = hashlib.blake2b(layout.encode(), digest_size=6).hexdigest()
    return f"{sum(t.numel() for t in tensors)} elements in {len(tensors)} tensors (checksum {code})"
