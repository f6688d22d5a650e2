"""The CUDA library, bound with ctypes: one function per kernel, for arguments that :mod:`.ops` has checked.

Work is enqueued on torch's current stream of the tensors' device, under a device guard. Nothing here waits for the
device except :func:`sample_threshold`, which returns a float. Outputs and scratch come from torch's caching
allocator, so a call allocates nothing on the device itself and can be captured into a CUDA graph.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from . import library
from .fused import Fused, Merged, Selected

_MASK64 = 0xFFFFFFFFFFFFFFFF
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SELECT, _INDICES, _RANDOM, _MERGE = range(4)  # commhooks_cuda_operation
_INVALID, _NO_MEMORY = 1, 2

_pointer = ctypes.c_void_p
_i64, _u64, _i32, _f32 = ctypes.c_int64, ctypes.c_uint64, ctypes.c_int32, ctypes.c_float
_scratch_and_stream = [_pointer, _i64, _pointer]


class _FusedStruct(ctypes.Structure):
    """``commhooks_fused`` of csrc/include/commhooks.h."""

    _fields_ = [
        ("grad", _pointer),
        ("residual", _pointer),
        ("velocity", _pointer),
        ("scale_ptr", _pointer),
        ("segment_offsets", _pointer),
        ("numel", _i64),
        ("num_segments", _i32),
        ("grad_dtype", _i32),
        ("scale", _f32),
        ("momentum", _f32),
    ]


_fused = ctypes.POINTER(_FusedStruct)
_SIGNATURES: dict[str, list[Any]] = {
    "select_topk": [_fused, _i64, _u64, _pointer, _pointer, _pointer, *_scratch_and_stream],
    "select_threshold": [_fused, _f32, _i64, _i64, _pointer, _pointer, _pointer, *_scratch_and_stream],
    "select_indices": [_fused, _pointer, _i64, _pointer, _pointer, *_scratch_and_stream],
    "sample_threshold": [_fused, _i64, _u64, _pointer, *_scratch_and_stream],
    "random_indices": [_u64, _u64, _u64, _i64, _i64, _pointer, *_scratch_and_stream],
    "merge_topk": [_pointer, _pointer, _i64] * 2 + [_i64] + [_pointer] * 4 + _scratch_and_stream,
    "scatter_add": [_pointer, _i64, _pointer, _pointer, _i64, _f32, _pointer],
    "write_back": [_pointer, _i32, _i64, _pointer, _pointer, _i64, _i64, _f32, _pointer],
}


@functools.cache
def declare(path: str) -> ctypes.CDLL:
    """The library at ``path`` with all its signatures."""
    loaded = ctypes.CDLL(path)
    for name, arguments in _SIGNATURES.items():
        function = getattr(
            loaded, f"commhooks_cuda_{name}"
        )  # not loaded[...], which makes a new one each time
        function.argtypes = arguments
        function.restype = _i32
    loaded.commhooks_cuda_scratch_bytes.argtypes = [_i32, _i64, _i64, _i64]
    loaded.commhooks_cuda_scratch_bytes.restype = _i64
    loaded.commhooks_cuda_last_error.argtypes = []
    loaded.commhooks_cuda_last_error.restype = ctypes.c_char_p
    return loaded


def _loaded() -> ctypes.CDLL:
    found = library.cuda()
    if found is None:
        raise RuntimeError("the CUDA library is not there: commhooks.native.ops should not have called it")
    return declare(found._name)


def _guard(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(device)


def _stream(device: torch.device) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream)


def _call(device: torch.device, name: str, *arguments: object) -> None:
    """Calls a kernel on the current stream, which goes last; raises what its status means."""
    loaded = _loaded()
    with _guard(device):
        status = getattr(loaded, f"commhooks_cuda_{name}")(*arguments, _stream(device))
    if status == 0:
        return
    text = f"{name}: {loaded.commhooks_cuda_last_error().decode()}"
    if status == _INVALID:
        raise ValueError(text)
    raise MemoryError(text) if status == _NO_MEMORY else RuntimeError(text)


def _scratch(device: torch.device, operation: int, numel: int, k: int, extra: int) -> Tensor:
    size = _loaded().commhooks_cuda_scratch_bytes(operation, numel, k, extra)
    if size < 0:
        raise ValueError(f"sizes are out of range: numel {numel}, k {k}, extra {extra}")
    return torch.empty(size, dtype=torch.uint8, device=device)


def _optional(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _struct(fused: Fused) -> _FusedStruct:
    segments = 0 if fused.segments is None else fused.segments.numel() - 1
    return _FusedStruct(
        fused.grad.data_ptr(),
        fused.residual.data_ptr(),
        _optional(fused.velocity),
        _optional(fused.scale_tensor),
        _optional(fused.segments),
        fused.grad.numel(),
        segments,
        _DTYPES[fused.grad.dtype],
        fused.scale,
        fused.momentum,
    )


def _outputs(fused: Fused, k: int) -> Selected:
    device = fused.residual.device
    return Selected(
        torch.empty(k, dtype=torch.float32, device=device),
        torch.empty(k, dtype=torch.int32, device=device),
        torch.empty(3, dtype=torch.int64, device=device),
    )


def _segments(fused: Fused) -> int:
    return 0 if fused.segments is None else fused.segments.numel() - 1


def _select(name: str, fused: Fused, k: int, *numbers: object) -> Selected:
    device = fused.residual.device
    out = _outputs(fused, k)
    scratch = _scratch(device, _SELECT, fused.residual.numel(), k, _segments(fused))
    pointers = (out.values.data_ptr(), out.indices.data_ptr(), out.report.data_ptr())
    _call(device, name, _struct(fused), *numbers, *pointers, scratch.data_ptr(), scratch.numel())
    return out


def select_topk(fused: Fused, k: int, seed: int = 0, threads: int | None = None) -> Selected:
    """See :func:`commhooks.native.ops.select_topk`; ``threads`` has no meaning here."""
    return _select("select_topk", fused, k, k, seed & _MASK64)


def select_threshold(
    fused: Fused, threshold: float, k: int, start: int = 0, threads: int | None = None
) -> Selected:
    """See :func:`commhooks.native.ops.select_threshold`; ``threads`` has no meaning here."""
    return _select("select_threshold", fused, k, threshold, k, start)


def select_indices(fused: Fused, indices: Tensor, threads: int | None = None) -> Selected:
    """See :func:`commhooks.native.ops.select_indices`; ``threads`` has no meaning here."""
    device = fused.residual.device
    k = indices.numel()
    values = torch.empty(k, dtype=torch.float32, device=device)
    report = torch.empty(3, dtype=torch.int64, device=device)
    scratch = _scratch(device, _INDICES, fused.residual.numel(), k, _segments(fused))
    pointers = (values.data_ptr(), report.data_ptr(), scratch.data_ptr())
    _call(device, "select_indices", _struct(fused), indices.data_ptr(), k, *pointers, scratch.numel())
    return Selected(values, indices.clone(), report)


def sample_threshold(fused: Fused, k: int, seed: int = 0) -> float:
    """See :func:`commhooks.native.ops.sample_threshold`; waits for the device."""
    device = fused.residual.device
    threshold = torch.empty(1, dtype=torch.float32, device=device)
    scratch = _scratch(device, _INDICES, fused.residual.numel(), k, 0)
    pointers = (threshold.data_ptr(), scratch.data_ptr())
    _call(device, "sample_threshold", _struct(fused), k, seed & _MASK64, *pointers, scratch.numel())
    return float(threshold.item())


def random_indices(seed: int, step: int, stream: int, numel: int, k: int, device: torch.device) -> Tensor:
    """See :func:`commhooks.native.ops.random_indices`; n / 8 bytes of scratch."""
    indices = torch.empty(k, dtype=torch.int32, device=device)
    scratch = _scratch(device, _RANDOM, numel, k, 0)
    keys = (seed & _MASK64, step & _MASK64, stream & _MASK64)
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
) -> Merged:
    """See :func:`commhooks.native.ops.merge_topk`."""
    device = values_a.device
    size_a, size_b = values_a.numel(), values_b.numel()
    merged = Merged(
        torch.empty(k, dtype=torch.float32, device=device),
        torch.empty(k, dtype=torch.int32, device=device),
        torch.empty(size_a, dtype=torch.bool, device=device),
        torch.empty(size_b, dtype=torch.bool, device=device),
    )
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
    """See :func:`commhooks.native.ops.scatter_add`."""
    pairs = (values.data_ptr(), indices.data_ptr(), values.numel())
    _call(dense.device, "scatter_add", dense.data_ptr(), dense.numel(), *pairs, scale)


def write_back(
    out: Tensor, values: Tensor, indices: Tensor, scale: float = 1.0, threads: int | None = None
) -> None:
    """See :func:`commhooks.native.ops.write_back`; ``values`` and ``indices`` have shape ``(m, k)``."""
    rows, k = values.shape
    dtype = _DTYPES[out.dtype]
    pairs = (values.data_ptr(), indices.data_ptr(), rows, k)
    _call(out.device, "write_back", out.data_ptr(), dtype, out.numel(), *pairs, scale)
