"""Calls of the CUDA library, one function per kernel, with arguments that :mod:`.ops` has checked.

Kernels are queued on torch's current stream of the tensors' device. Only :func:`sample_threshold`, which
returns a float, waits for the device. Outputs and scratch space come from torch's caching allocator. The
library itself allocates no device memory, so that a call can be captured into a CUDA graph.
"""

from __future__ import annotations

import contextlib
import ctypes

import torch
from torch import Tensor

from . import abi
from .fused import Fused, Merged, Selected

# Values of the C enum commhooks_cuda_operation, for the size of the scratch space.
_SELECT, _INDICES, _RANDOM, _MERGE = range(4)


def _loaded() -> ctypes.CDLL:
    found = abi.cuda()
    if found is None:
        raise RuntimeError("the CUDA library is not there: commhooks.native.ops should not have called it")
    return found


def _guard(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(device)


def _stream(device: torch.device) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream)


def _call(device: torch.device, name: str, *arguments: object) -> None:
    """Calls ``commhooks_cuda_<name>`` on the current stream and turns its status into an exception.

    The stream is the last argument of every function.
    """
    loaded = _loaded()
    with _guard(device):
        status = getattr(loaded, f"commhooks_cuda_{name}")(*arguments, _stream(device))
    if status == 0:
        return
    text = f"{name}: {loaded.commhooks_cuda_last_error().decode()}"
    if status == abi.INVALID:
        raise ValueError(text)
    raise MemoryError(text) if status == abi.NO_MEMORY else RuntimeError(text)


def _scratch(device: torch.device, operation: int, numel: int, k: int, extra: int) -> Tensor:
    size = _loaded().commhooks_cuda_scratch_bytes(operation, numel, k, extra)
    if size < 0:
        raise ValueError(f"sizes are out of range: numel {numel}, k {k}, extra {extra}")
    return torch.empty(size, dtype=torch.uint8, device=device)


def _select(name: str, fused: Fused, k: int, out: Selected | None, *numbers: object) -> Selected:
    device = fused.residual.device
    out = Selected.empty(fused, k) if out is None else out
    scratch = _scratch(device, _SELECT, fused.residual.numel(), k, fused.num_segments)
    pointers = (out.values.data_ptr(), out.indices.data_ptr(), out.report.data_ptr())
    _call(
        device,
        name,
        abi.operands(fused, out.active),
        *numbers,
        *pointers,
        scratch.data_ptr(),
        scratch.numel(),
    )
    return out


def select_topk(
    fused: Fused, k: int, seed: int = 0, threads: int | None = None, out: Selected | None = None
) -> Selected:
    """See :func:`commhooks.native.ops.select_topk`. ``threads`` has no meaning here."""
    return _select("select_topk", fused, k, out, k, seed & abi.MASK64)


def select_threshold(
    fused: Fused,
    threshold: float,
    k: int,
    start: int = 0,
    threads: int | None = None,
    out: Selected | None = None,
) -> Selected:
    """See :func:`commhooks.native.ops.select_threshold`. ``threads`` has no meaning here."""
    return _select("select_threshold", fused, k, out, threshold, k, start)


def select_indices(
    fused: Fused, indices: Tensor, threads: int | None = None, out: Selected | None = None
) -> Selected:
    """See :func:`commhooks.native.ops.select_indices`. ``threads`` has no meaning here."""
    device = fused.residual.device
    k = indices.numel()
    out = Selected.empty(fused, k, indices=indices.clone()) if out is None else out
    scratch = _scratch(device, _INDICES, fused.residual.numel(), k, fused.num_segments)
    pointers = (out.values.data_ptr(), out.report.data_ptr(), scratch.data_ptr())
    operands = abi.operands(fused, out.active)
    _call(device, "select_indices", operands, indices.data_ptr(), k, *pointers, scratch.numel())
    return out


def sample_threshold(fused: Fused, k: int, seed: int = 0) -> float:
    """See :func:`commhooks.native.ops.sample_threshold`. It waits for the device."""
    device = fused.residual.device
    threshold = torch.empty(1, dtype=torch.float32, device=device)
    scratch = _scratch(device, _INDICES, fused.residual.numel(), k, 0)
    pointers = (threshold.data_ptr(), scratch.data_ptr())
    _call(device, "sample_threshold", abi.operands(fused), k, seed & abi.MASK64, *pointers, scratch.numel())
    return float(threshold.item())


def random_indices(seed: int, step: int, stream: int, numel: int, k: int, device: torch.device) -> Tensor:
    """See :func:`commhooks.native.ops.random_indices`. It takes ``numel / 8`` bytes of scratch space."""
    indices = torch.empty(k, dtype=torch.int32, device=device)
    scratch = _scratch(device, _RANDOM, numel, k, 0)
    keys = (seed & abi.MASK64, step & abi.MASK64, stream & abi.MASK64)
    pointers = (indices.data_ptr(), scratch.data_ptr())
    _call(device, "random_indices", *keys, numel, k, *pointers, scratch.numel())
    return indices


def merge_topk(
    values_a: Tensor,
    indices_a: Tensor,
    values_b: Tensor,
    indices_b: Tensor,
    k: int,
    threads: int | None = None,
    result: Merged | None = None,
) -> Merged:
    """See :func:`commhooks.native.ops.merge_topk`. ``threads`` has no meaning here."""
    device = values_a.device
    size_a, size_b = values_a.numel(), values_b.numel()
    merged = Merged.empty(k, size_a, size_b, device) if result is None else result
    scratch = _scratch(device, _MERGE, size_a, 0, size_b)
    inputs = (
        values_a.data_ptr(),
        indices_a.data_ptr(),
        size_a,
        values_b.data_ptr(),
        indices_b.data_ptr(),
        size_b,
    )
    outputs = [tensor.data_ptr() for tensor in merged]
    _call(device, "merge_topk", *inputs, k, *outputs, scratch.data_ptr(), scratch.numel())
    return merged


def scatter_add(dense: Tensor, values: Tensor, indices: Tensor, scale: float = 1.0) -> None:
    """See :func:`commhooks.native.ops.scatter_add`. ``values`` and ``indices`` have shape ``(m, k)``."""
    _call(dense.device, "scatter_add", dense.data_ptr(), dense.numel(), abi.rows(values, indices), scale)


def write_back(
    out: Tensor, values: Tensor, indices: Tensor, scale: float = 1.0, threads: int | None = None
) -> None:
    """See :func:`commhooks.native.ops.write_back`. ``values`` and ``indices`` have shape ``(m, k)``."""
    target = out.data_ptr(), abi.DTYPES[out.dtype], out.numel()
    _call(out.device, "write_back", *target, abi.rows(values, indices), scale)


def low_bit_encode(
    x: Tensor, bits: int, out: Tensor, remainder: Tensor | None = None, threads: int | None = None
) -> None:
    """See :func:`commhooks.native.ops.low_bit_encode`. ``threads`` has no meaning here."""
    rest = None if remainder is None else remainder.data_ptr()
    _call(x.device, "low_bit_encode", x.data_ptr(), x.numel(), bits, out.data_ptr(), out.numel(), rest)


def low_bit_decode(message: Tensor, bits: int, out: Tensor, threads: int | None = None) -> None:
    """See :func:`commhooks.native.ops.low_bit_decode`. ``message`` has shape ``(1, size)``."""
    _call(out.device, "low_bit_decode", abi.messages(message, bits), out.data_ptr(), out.numel())


def low_bit_decode_add(messages: Tensor, bits: int, out: Tensor, threads: int | None = None) -> None:
    """See :func:`commhooks.native.ops.low_bit_decode_add`. ``messages`` has shape ``(rows, size)``."""
    _call(out.device, "low_bit_decode_add", abi.messages(messages, bits), out.data_ptr(), out.numel())
