"""Top-k with error feedback and sparse merging on arrays of any library, without a copy.

An array may be a torch tensor, a numpy array, or anything that exports DLPack or ``__cuda_array_interface__``
(CuPy, JAX for reading, Numba). Results are arrays of the first argument's library, or torch tensors when that
library cannot import them. CuPy arrays are processed on CuPy's current stream. All other arrays on a GPU are
processed on torch's current stream, which first waits for the stream named by ``__cuda_array_interface__``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..native import ops
from ..native.fused import Fused
from .dlpack import like, stream_of, to_tensor

__all__ = ["MergedArrays", "Pairs", "merge", "topk"]


class Pairs(NamedTuple):
    """The pairs of a sparse gradient.

    Attributes:
        values: ``(k,)``, float32; 0 at unused places.
        indices: ``(k,)``, int32, ascending; 2**31 - 1 at unused places, which are at the end.
    """

    values: Any
    indices: Any


class MergedArrays(NamedTuple):
    """The pairs of a merged sparse gradient, and which entries of the inputs are in it.

    Attributes:
        values: ``(k,)``, float32; 0 at unused places.
        indices: ``(k,)``, int32, ascending; 2**31 - 1 at unused places, which are at the end.
        survives_a: bool, as long as input a: whether the index of each entry is in the result.
        survives_b: the same for input b.
    """

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
    """Takes out the ``k`` largest magnitudes of ``residual + scale * grad``; the rest stays in ``residual``.

    This is the selection alone, of one array. For a DDP model see :meth:`commhooks.SparseState.topk`, which
    takes a density instead of ``k``.

    Args:
        grad: ``(n,)``, float32, float16 or bfloat16, contiguous; only read.
        k: number of places, in [0, n].
        residual: ``(n,)``, float32, overwritten with the sum, 0 where an element is taken. None: starts at 0
            and is not returned.
        velocity: ``(n,)``, float32, overwritten with ``momentum * velocity + scale * grad``, which replaces
            ``scale * grad`` in the sum. None: no momentum.
        momentum: factor of the old velocity.
        scale: factor of the gradient.
        threads: number of CPU threads, default torch's; never changes the result.

    Returns:
        ``k`` places, sorted by index. Ties go to the lower index. Zeros are not taken: with fewer than ``k``
        nonzero elements the remaining places are unused.

    Raises:
        TypeError: not an array, or a wrong dtype.
        ValueError: sizes, devices, layout, ``k``, or a residual or velocity that is known to be read-only: by
            the flags of numpy, DLPack or the CUDA array interface, or because it is of JAX or TensorFlow.

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
        old_velocity = None if velocity is None else to_tensor("velocity", velocity, written=True)
        fused = Fused(gradient.detach(), memory, old_velocity, momentum, scale)
        selected = ops.select_topk(fused, k, threads=threads)
        return Pairs(like(grad, selected.values), like(grad, selected.indices))


def merge(values_a: Any, indices_a: Any, values_b: Any, indices_b: Any, k: int) -> MergedArrays:
    """The ``k`` largest magnitudes of the sum of two sparse gradients.

    This is gTop-k's operator (eq. 6 of Shi et al., IJCAI 2019). Inputs are not changed.

    Args:
        values_a: ``(m,)``, float32.
        indices_a: ``(m,)``, int32, ascending and unique, unused places (2**31 - 1) at the end.
        values_b: like ``values_a``, of any length.
        indices_b: like ``indices_a``.
        k: number of places in the result.

    Returns:
        ``k`` places, sorted by index, and which entries of each input are among them. Ties go to the lower
        index.

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
