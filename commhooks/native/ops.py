"""The kernels, one function each: arguments are checked, then the library of the device is called.

All tensors are 1-D (``write_back`` also takes rows), contiguous, without gradient and on one device. Indices are
int32, ascending and unique, with :data:`PAD` at unused places at the end. A bad argument raises ``TypeError``
(dtype) or ``ValueError`` (everything else) before anything is read or written. What a kernel does per element
stands in :class:`Fused`; implementations give the same bits (see :mod:`commhooks.native.reference`).
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from . import reference
from .fused import PAD, Fused, Merged, Selected

__all__ = [
    "PAD",
    "Fused",
    "Merged",
    "Selected",
    "merge_topk",
    "random_indices",
    "sample_threshold",
    "scatter_add",
    "select_indices",
    "select_threshold",
    "select_topk",
    "write_back",
]

_GRAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_F32 = (torch.float32,)
_I32 = (torch.int32,)


def _implementation(device: torch.device) -> ModuleType:
    return reference


def _check(
    name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], device: torch.device, numel: int | None = None
) -> None:
    """Raises unless ``tensor`` is a contiguous 1-D tensor of one of ``dtypes`` on ``device``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must have dtype {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if tensor.layout != torch.strided or tensor.dim() != 1 or not tensor.is_contiguous():
        raise ValueError(f"{name} must be a contiguous 1-D tensor, got shape {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")
    if tensor.requires_grad:
        raise ValueError(f"{name} must not require grad (detach it)")
    if numel is not None and tensor.numel() != numel:
        raise ValueError(f"{name} must have {numel} elements, got {tensor.numel()}")
    if tensor.numel() >= PAD:
        raise ValueError(f"{name} must have fewer than 2**31 - 1 elements, got {tensor.numel()}")


def _check_fused(fused: Fused) -> None:
    residual = fused.residual
    if not isinstance(residual, Tensor):
        raise TypeError(f"residual must be a torch.Tensor, got {type(residual).__name__}")
    device = residual.device
    numel = residual.numel()
    _check("residual", residual, _F32, device)
    _check("grad", fused.grad, _GRAD_DTYPES, device, numel)
    written = [("residual", residual)]
    if fused.velocity is not None:
        _check("velocity", fused.velocity, _F32, device, numel)
        written.append(("velocity", fused.velocity))
    elif fused.momentum != 0.0:
        raise ValueError(f"momentum must be 0 without velocity, got {fused.momentum}")
    if fused.scale_tensor is not None:
        tensor = fused.scale_tensor
        _check("scale_tensor", tensor.reshape(-1) if isinstance(tensor, Tensor) else tensor, _F32, device, 1)
    if fused.segments is not None:
        _check_segments(fused.segments, device, numel)
    _check_no_overlap(fused.grad, written)


def _check_segments(segments: Tensor, device: torch.device, numel: int) -> None:
    """On CUDA the offsets themselves are not looked at: that would wait for the device."""
    _check("segments", segments, (torch.int64,), device)
    if segments.numel() < 2:
        raise ValueError(f"segments must hold at least 2 offsets, got {segments.numel()}")
    if device.type == "cpu":
        first, last = int(segments[0]), int(segments[-1])
        if first != 0 or last != numel or bool((segments[1:] < segments[:-1]).any()):
            raise ValueError(f"segments must ascend from 0 to {numel}, got {segments.tolist()}")


def _check_no_overlap(grad: Tensor, written: list[tuple[str, Tensor]]) -> None:
    spans = [("grad", grad), *written]
    for i, (name_a, a) in enumerate(spans):
        for name_b, b in spans[i + 1 :]:
            start_a, start_b = a.data_ptr(), b.data_ptr()
            end_a, end_b = start_a + a.numel() * a.element_size(), start_b + b.numel() * b.element_size()
            if start_a < end_b and start_b < end_a:
                raise ValueError(f"{name_a} and {name_b} must not share memory")


def _check_k(k: int, numel: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be an int, got {type(k).__name__}")
    if not 0 <= k <= numel:
        raise ValueError(f"k must be in [0, {numel}], got {k}")


def _check_threads(threads: int | None) -> None:
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")


def _check_pairs(
    suffix: str, values: Tensor, indices: Tensor, device: torch.device, numel: int | None
) -> None:
    """Checks one sparse gradient; on the CPU also that indices ascend, are unique and below ``numel``."""
    _check(f"indices{suffix}", indices, _I32, device)
    _check(f"values{suffix}", values, _F32, device, indices.numel())
    _check_indices(f"indices{suffix}", indices, numel)


def _check_indices(name: str, indices: Tensor, numel: int | None) -> None:
    if indices.device.type != "cpu" or not indices.numel():
        return
    if int(indices[0]) < 0 or bool(((indices[1:] <= indices[:-1]) & (indices[1:] != PAD)).any()):
        raise ValueError(f"{name} must be ascending, unique and not negative, with padding at the end")
    if numel is not None:
        largest = int(torch.where(indices == PAD, -1, indices).max())
        if largest >= numel:
            raise ValueError(f"{name} must be below {numel}, got {largest}")


def select_topk(fused: Fused, k: int, *, seed: int = 0, threads: int | None = None) -> Selected:
    """Compensates and takes out the ``k`` largest magnitudes, exactly (ties: the lower index).

    Zeros are never taken: with fewer than ``k`` nonzero elements the rest is padding.

    Args:
        fused: operands; residual and velocity are overwritten.
        k: number of places, in [0, n].
        seed: of the sample that guesses a threshold. Changes time, never the result.
        threads: number of CPU threads, default torch's; never changes the result.

    Returns:
        ``Selected`` of ``k`` places, sorted by index.

    Raises:
        TypeError: a wrong dtype.
        ValueError: sizes, devices, layout or ``k``.
    """
    _check_fused(fused)
    _check_k(k, fused.residual.numel())
    _check_threads(threads)
    implementation = _implementation(fused.residual.device)
    result: Selected = implementation.select_topk(fused, k, seed, threads)
    return result


def select_threshold(
    fused: Fused, threshold: float, k: int, *, start: int = 0, threads: int | None = None
) -> Selected:
    """Compensates and takes out elements with magnitude above ``threshold``, at most ``k`` of them.

    They are taken in index order beginning cyclically at index ``start``; what exceeds ``k`` stays.

    Args:
        fused: operands; residual and velocity are overwritten.
        threshold: at least 0.
        k: number of places, in [0, n].
        start: in [0, n), or 0 when n is 0.
        threads: number of CPU threads, default torch's; never changes the result.

    Returns:
        ``Selected`` of ``k`` places, sorted by index.

    Raises:
        TypeError: a wrong dtype.
        ValueError: sizes, devices, layout, ``k``, ``threshold`` or ``start``.
    """
    _check_fused(fused)
    numel = fused.residual.numel()
    _check_k(k, numel)
    _check_threads(threads)
    if not threshold >= 0.0:
        raise ValueError(f"threshold must be at least 0, got {threshold}")
    if not 0 <= start < max(numel, 1):
        raise ValueError(f"start must be in [0, {max(numel, 1)}), got {start}")
    implementation = _implementation(fused.residual.device)
    result: Selected = implementation.select_threshold(fused, float(threshold), k, start, threads)
    return result


def sample_threshold(fused: Fused, k: int, *, seed: int = 0) -> float:
    """Estimate of the ``k``-th largest magnitude of the corrected gradient, from a sample; touches nothing.

    Waits for the device. Non-finite elements count as 0 and inactive segments like active ones.

    Raises:
        TypeError: a wrong dtype.
        ValueError: sizes, devices, layout or ``k``.
    """
    _check_fused(fused)
    _check_k(k, fused.residual.numel())
    implementation = _implementation(fused.residual.device)
    result: float = implementation.sample_threshold(fused, k, seed)
    return result


def select_indices(fused: Fused, indices: Tensor, *, threads: int | None = None) -> Selected:
    """Compensates and takes out the elements at ``indices``.

    Args:
        fused: operands; residual and velocity are overwritten.
        indices: shape ``(k,)``, int32, ascending, unique. An entry in an inactive segment gives value 0 and its
            residual is kept.
        threads: number of CPU threads, default torch's; never changes the result.

    Returns:
        ``Selected`` with a copy of ``indices``; the report counts those that are not padding.

    Raises:
        TypeError: a wrong dtype.
        ValueError: sizes, devices, layout, or (CPU) indices out of order or range.
    """
    _check_fused(fused)
    _check("indices", indices, _I32, fused.residual.device)
    _check_indices("indices", indices, fused.residual.numel())
    _check_threads(threads)
    implementation = _implementation(fused.residual.device)
    result: Selected = implementation.select_indices(fused, indices, threads)
    return result


def random_indices(
    seed: int, step: int, stream: int, numel: int, k: int, device: torch.device | str = "cpu"
) -> Tensor:
    """``k`` distinct indices below ``numel``, the same bits on every device and machine.

    Integers only: a Feistel permutation with cycle-walking, keyed by ``(seed, step, stream)``, applied to
    0 .. k-1 in O(k). No global random state is read or changed.

    Returns:
        shape ``(k,)``, int32, ascending, on ``device``.

    Raises:
        ValueError: ``k`` or ``numel`` out of range.
    """
    if isinstance(numel, bool) or not isinstance(numel, int):
        raise TypeError(f"numel must be an int, got {type(numel).__name__}")
    if not 0 <= numel < PAD:
        raise ValueError(f"numel must be in [0, 2**31 - 1), got {numel}")
    _check_k(k, numel)
    device = torch.device(device)
    result: Tensor = _implementation(device).random_indices(seed, step, stream, numel, k, device)
    return result


def merge_topk(values_a: Tensor, indices_a: Tensor, values_b: Tensor, indices_b: Tensor, k: int) -> Merged:
    """The ``k`` largest magnitudes of the sum of two sparse gradients, sorted by index.

    gTop-k's operator (eq. 6 of Shi et al., IJCAI 2019), O(k). Every entry of the inputs is eligible, also a sum
    that cancels to 0 (it ranks last); ties go to the lower index. Inputs are not changed.

    Raises:
        TypeError: a wrong dtype.
        ValueError: sizes, devices, layout, a negative ``k``, or (CPU) indices out of order.
    """
    device = values_a.device if isinstance(values_a, Tensor) else torch.device("cpu")
    _check_pairs("_a", values_a, indices_a, device, None)
    _check_pairs("_b", values_b, indices_b, device, None)
    _check_k(k, PAD - 1)
    implementation = _implementation(device)
    result: Merged = implementation.merge_topk(values_a, indices_a, values_b, indices_b, k)
    return result


def scatter_add(dense: Tensor, values: Tensor, indices: Tensor, scale: float = 1.0) -> None:
    """``dense[indices] += scale * values`` in place; padding is skipped.

    Args:
        dense: shape ``(n,)``, float32, changed in place.
        values: shape ``(k,)``, float32.
        indices: shape ``(k,)``, int32, ascending, unique, below n.
        scale: factor of the values; the product is rounded to float32 before it is added.

    Raises:
        TypeError: a wrong dtype.
        ValueError: sizes, devices, layout, or (CPU) indices out of order or range.
    """
    device = dense.device if isinstance(dense, Tensor) else torch.device("cpu")
    _check("dense", dense, _F32, device)
    _check_pairs("", values, indices, device, dense.numel())
    _implementation(device).scatter_add(dense, values, indices, float(scale))


def write_back(
    out: Tensor, values: Tensor, indices: Tensor, scale: float = 1.0, *, threads: int | None = None
) -> None:
    """Overwrites ``out`` with the sparse sum: zero everywhere, then ``scale * values`` added at ``indices``.

    Args:
        out: shape ``(n,)``, float32, bfloat16 or float16, overwritten.
        values: shape ``(k,)`` or ``(m, k)``, float32. Rows are added in order. Half precision takes one row;
            it is rounded to nearest and clamped to the finite range.
        indices: like ``values``, int32, each row ascending and unique, below n.
        scale: factor of the values.
        threads: number of CPU threads, default torch's; never changes the result.

    Raises:
        TypeError: a wrong dtype.
        ValueError: sizes, devices, layout, or (CPU) indices out of order or range.
    """
    device = out.device if isinstance(out, Tensor) else torch.device("cpu")
    _check("out", out, _GRAD_DTYPES, device)
    if isinstance(values, Tensor) and isinstance(indices, Tensor):
        if values.shape != indices.shape or values.dim() not in (1, 2):
            raise ValueError(
                f"values and indices must have one shape, (k,) or (m, k), "
                f"got {tuple(values.shape)} and {tuple(indices.shape)}"
            )
        if values.dim() == 1:
            values, indices = values[None], indices[None]
        if out.dtype != torch.float32 and values.shape[0] > 1:
            raise ValueError(f"values must be one row for {out.dtype}, got {values.shape[0]} rows")
        if not (values.is_contiguous() and indices.is_contiguous()):
            raise ValueError("values and indices must be contiguous")
    for row_values, row_indices in zip(values, indices, strict=True):
        _check_pairs("", row_values, row_indices, device, out.numel())
    _check_threads(threads)
    _implementation(device).write_back(out, values, indices, float(scale), threads)
