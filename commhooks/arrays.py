"""Top-k with error feedback and sparse merging on arrays of any library, without a copy.

An array may be a torch tensor, a numpy array, or anything that exports DLPack or ``__cuda_array_interface__`` (CuPy, JAX
for reading, Numba). Results are arrays of the library of the first argument (torch tensors when it cannot take them
back). CuPy arrays are worked on in CuPy's current stream.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from .native import ops
from .native.fused import Fused

__all__ = ["MergedArrays", "Pairs", "merge", "topk"]


class Pairs(NamedTuple):
    """``values`` float32 ``(k,)`` and ``indices`` int32 ``(k,)``, ascending; unused places: value 0, index 2**31 - 1."""

    values: Any
    indices: Any


class MergedArrays(NamedTuple):
    """``Pairs``, and for each input whether the index of an entry is in the result (bool, as long as the input)."""

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
        velocity: ``(n,)``, float32, updated to ``momentum * velocity + scale * grad``, which then takes the place of
            the gradient. None: no momentum.
        momentum: factor of the old velocity.
        scale: factor of the gradient.
        threads: number of CPU threads, default torch's; never changes the result.

    Returns:
        Exactly ``k`` places, sorted by index; ties go to the lower index, zeros are not taken.

    Raises:
        TypeError: not an array, or a wrong dtype.
        ValueError: sizes, devices, layout, ``k``, or a read-only residual or velocity.

    Example:
        >>> residual = numpy.zeros_like(grad)
        >>> values, indices = commhooks.topk(grad, 100, residual=residual)
    """
    with _stream_of(grad):
        gradient = _tensor("grad", grad)
        if residual is None:
            memory = torch.zeros(gradient.shape, dtype=torch.float32, device=gradient.device)
        else:
            memory = _tensor("residual", residual, written=True)
        speed = None if velocity is None else _tensor("velocity", velocity, written=True)
        fused = Fused(gradient.detach(), memory, speed, momentum, scale)
        selected = ops.select_topk(fused, k, threads=threads)
        return Pairs(_like(grad, selected.values), _like(grad, selected.indices))


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
    with _stream_of(values_a):
        merged = ops.merge_topk(
            _tensor("values_a", values_a),
            _tensor("indices_a", indices_a),
            _tensor("values_b", values_b),
            _tensor("indices_b", indices_b),
            k,
        )
        return MergedArrays(*(_like(values_a, part) for part in merged))


def _module(array: Any) -> str:
    return type(array).__module__.split(".")[0]


@contextlib.contextmanager
def _stream_of(array: Any) -> Iterator[None]:
    """Makes CuPy's current stream torch's for as long as the context lasts; nothing for other arrays."""
    if _module(array) != "cupy":
        yield
        return
    cupy = sys.modules["cupy"]
    pointer = cupy.cuda.get_current_stream().ptr
    device = torch.device("cuda", array.device.id)
    stream: torch.cuda.Stream = torch.cuda.default_stream(device)
    if pointer:
        stream = torch.cuda.ExternalStream(pointer, device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        yield


def _tensor(name: str, array: Any, *, written: bool = False) -> Tensor:
    """A tensor over the memory of ``array``."""
    if isinstance(array, Tensor):
        return array
    if _module(array) == "numpy" and hasattr(array, "flags"):
        if written and not array.flags.writeable:
            raise ValueError(f"{name} must be writeable, got a read-only array")
        if any(stride < 0 for stride in array.strides):
            raise ValueError(f"{name} must be contiguous, got strides {array.strides}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about read-only arrays: those are only read here
            return torch.from_numpy(array)
    if hasattr(array, "__dlpack__"):
        tensor: Tensor = from_dlpack(array)
        return tensor
    if hasattr(array, "__cuda_array_interface__"):
        return torch.as_tensor(array, device="cuda")
    raise TypeError(f"{name} must export DLPack or __cuda_array_interface__, got {type(array).__name__}")


def _like(array: Any, tensor: Tensor) -> Any:
    """``tensor`` as an array of the library of ``array``, over the same memory."""
    if isinstance(array, Tensor):
        return tensor
    module = _module(array)
    if module == "numpy":
        return tensor.numpy()
    namespace = sys.modules.get(module)
    if not hasattr(namespace, "from_dlpack"):
        return tensor
    if tensor.dtype == torch.bool:
        # Not every library takes booleans through DLPack.
        return namespace.from_dlpack(tensor.view(torch.uint8)).astype("bool")  # type: ignore[union-attr]
    return namespace.from_dlpack(tensor)  # type: ignore[union-attr]
