"""Top-k with error feedback and sparse merging on arrays of any library, without a copy.

An array may be a torch tensor, a numpy array, or anything that exports DLPack or ``__cuda_array_interface__``
(CuPy, JAX for reading, Numba). Results are arrays of the library of the first argument (torch tensors when it
cannot take them back). CuPy arrays are worked on in CuPy's current stream, all others on a GPU in torch's
current stream, which waits for the stream that ``__cuda_array_interface__`` names.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..native import ops
from ..native.fused import Fused
from .dlpack import like, stream_of, to_tensor

__all__ = ["MergedArrays", "Pairs", "merge", "topk"]


class Pairs(NamedTuple):
    """``values`` float32 ``(k,)``; ``indices`` int32 ``(k,)``, ascending; unused places: 0 and 2**31 - 1."""

    values: Any
    indices: Any


class MergedArrays(NamedTuple):
    """``Pairs``, and for each entry of both inputs whether its index is in the result (bool)."""

    values: Any
    indices: Any
    survives_a: Any
    survives_b: Any


def topk(
    grad: Any,
    k: int,
    *,
    residual: Any = None,
    velocity: Any = None,
    momentum: float = 0.0,
    scale: float = 1.0,
    threads: int | None = None,
) -> Pairs:
    """The ``k`` largest magnitudes of ``residual + scale * grad``, taken out of the residual.

    Args:
        grad: ``(n,)``, float32, float16 or bfloat16, contiguous; only read.
        k: number of places, in [0, n].
        residual: ``(n,)``, float32; what is not taken stays here for the next call. None: nothing is kept.
        velocity: ``(n,)``, float32, updated to ``momentum * velocity + scale * grad``, which then takes the
            place of the gradient. None: no momentum.
        momentum: factor of the old velocity.
        scale: factor of the gradient.
        threads: number of CPU threads, default torch's; never changes the result.

    Returns:
        Exactly ``k`` places, sorted by index; ties go to the lower index, zeros are not taken.

    Raises:
        TypeError: not an array, or a wrong dtype.
        ValueError: sizes, devices, layout, ``k``, or a residual or velocity that is read-only, as far as that
            can be known: by numpy's and DLPack's flags, the CUDA array interface's, and for all arrays of JAX
            and TensorFlow.

    Example:
        >>> residual = numpy.zeros_like(grad)
        >>> values, indices = commhooks.topk(grad, 100, residual=residual)
    """
    with stream_of(grad):
        gradient = to_tensor("grad", grad)
        if residual is None:
            memory = torch.zeros(gradient.shape, dtype=torch.float32, device=gradient.device)
        else:
            memory = to_tensor("residual", residual, written=True)
        speed = None if velocity is None else to_tensor("velocity", velocity, written=True)
        fused = Fused(gradient.detach(), memory, speed, momentum, scale)
        selected = ops.select_topk(fused, k, threads=threads)
        return Pairs(like(grad, selected.values), like(grad, selected.indices))


def merge(values_a: Any, indices_a: Any, values_b: Any, indices_b: Any, k: int) -> MergedArrays:
    """The ``k`` largest magnitudes of the sum of two sparse gradients (gTop-k's operator).

    Args:
        values_a: ``(m,)``, float32.
        indices_a: ``(m,)``, int32, ascending and unique, unused places (2**31 - 1) at the end.
        values_b: like ``values_a``, of any length.
        indices_b: like ``indices_a``.
        k: number of places of the result.

    Raises:
        TypeError: not an array, or a wrong dtype.
        ValueError: sizes, devices, layout, ``k``, or (CPU) indices out of order.
    """
    with stream_of(values_a):
        merged = ops.merge_topk(
            to_tensor("values_a", values_a),
            to_tensor("indices_a", indices_a),
            to_tensor("values_b", values_b),
            to_tensor("indices_b", indices_b),
            k,
        )
        return MergedArrays(*(like(values_a, part) for part in merged))
