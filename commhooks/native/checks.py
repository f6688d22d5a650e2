"""Checks of the kernels' arguments: ``TypeError`` for a dtype, ``ValueError`` for everything else."""

from __future__ import annotations

import torch
from torch import Tensor

from .fused import PAD, Fused

GRAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
F32 = (torch.float32,)
I32 = (torch.int32,)


def array(
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


def fused_operands(fused: Fused) -> None:
    residual = fused.residual
    if not isinstance(residual, Tensor):
        raise TypeError(f"residual must be a torch.Tensor, got {type(residual).__name__}")
    device = residual.device
    numel = residual.numel()
    array("residual", residual, F32, device)
    array("grad", fused.grad, GRAD_DTYPES, device, numel)
    written = [("residual", residual)]
    if fused.velocity is not None:
        array("velocity", fused.velocity, F32, device, numel)
        written.append(("velocity", fused.velocity))
    elif fused.momentum != 0.0:
        raise ValueError(f"momentum must be 0 without velocity, got {fused.momentum}")
    if fused.scale_tensor is not None:
        factor = fused.scale_tensor
        array("scale_tensor", factor.reshape(-1) if isinstance(factor, Tensor) else factor, F32, device, 1)
    if fused.segments is not None:
        segment_offsets(fused.segments, device)
    no_overlap(fused.grad, written)


def segment_offsets(segments: Tensor, device: torch.device) -> None:
    """The array itself; what it holds is looked at by :func:`segment_order`."""
    array("segments", segments, (torch.int64,), device)
    if segments.numel() < 2:
        raise ValueError(f"segments must hold at least 2 offsets, got {segments.numel()}")


def segment_order(fused: Fused) -> None:
    """On CUDA the offsets are not looked at: that would wait for the device."""
    segments, numel = fused.segments, fused.residual.numel()
    if segments is None or segments.device.type != "cpu":
        return
    if int(segments[0]) != 0 or int(segments[-1]) != numel or bool((segments[1:] < segments[:-1]).any()):
        raise ValueError(f"segments must ascend from 0 to {numel}, got {segments.tolist()}")


def no_overlap(grad: Tensor, written: list[tuple[str, Tensor]]) -> None:
    spans = [("grad", grad), *written]
    for i, (name_a, a) in enumerate(spans):
        for name_b, b in spans[i + 1 :]:
            start_a, start_b = a.data_ptr(), b.data_ptr()
            end_a, end_b = start_a + a.numel() * a.element_size(), start_b + b.numel() * b.element_size()
            if start_a < end_b and start_b < end_a:
                raise ValueError(f"{name_a} and {name_b} must not share memory")


def places(k: int, numel: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be an int, got {type(k).__name__}")
    if not 0 <= k <= numel:
        raise ValueError(f"k must be in [0, {numel}], got {k}")


def thread_count(threads: int | None) -> None:
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")


def pairs(suffix: str, values: Tensor, indices: Tensor, device: torch.device) -> None:
    """One sparse gradient; what the indices hold is looked at by :func:`index_order`."""
    array(f"indices{suffix}", indices, I32, device)
    array(f"values{suffix}", values, F32, device, indices.numel())


def index_order(name: str, indices: Tensor, numel: int | None) -> None:
    """On CUDA the indices are not looked at: that would wait for the device."""
    if indices.device.type != "cpu" or not indices.numel():
        return
    if int(indices[0]) < 0 or bool(((indices[1:] <= indices[:-1]) & (indices[1:] != PAD)).any()):
        raise ValueError(f"{name} must be ascending, unique and not negative, with padding at the end")
    if numel is not None:
        largest = int(torch.where(indices == PAD, -1, indices).max())
        if largest >= numel:
            raise ValueError(f"{name} must be below {numel}, got {largest}")


def rows(values: Tensor, indices: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """``write_back``'s pairs as ``(m, k)`` rows."""
    array("values", values.reshape(-1) if isinstance(values, Tensor) else values, F32, out.device)
    array("indices", indices.reshape(-1) if isinstance(indices, Tensor) else indices, I32, out.device)
    if values.shape != indices.shape or values.dim() not in (1, 2):
        raise ValueError(
            f"values and indices must have one shape, (k,) or (m, k), "
            f"got {tuple(values.shape)} and {tuple(indices.shape)}"
        )
    if not (values.is_contiguous() and indices.is_contiguous()):
        raise ValueError(
            f"values and indices must be contiguous, got strides {values.stride()}, {indices.stride()}"
        )
    if values.dim() == 1:
        values, indices = values[None], indices[None]
    if out.dtype != torch.float32 and values.shape[0] > 1:
        raise ValueError(f"values must be one row for {out.dtype}, got {values.shape[0]} rows")
    return values, indices
