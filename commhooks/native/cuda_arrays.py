"""Arrays of other libraries (CuPy's above all) as CUDA tensors and back, without a copy, on their own stream."""

from __future__ import annotations

import contextlib
import sys
from typing import Any, Iterator

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack


def _cupy_of(array: object) -> Any:
    """The ``cupy`` module when ``array`` is CuPy's, else None. Never imports it."""
    return sys.modules.get("cupy") if type(array).__module__.split(".")[0] == "cupy" else None


@contextlib.contextmanager
def stream_of(*arrays: object) -> Iterator[None]:
    """Makes the stream that CuPy uses now torch's current one, when one of ``arrays`` is CuPy's.

    Kernels called inside are then ordered with what was and will be enqueued through CuPy, without waiting.
    """
    for array in arrays:
        cupy = _cupy_of(array)
        if cupy is None:
            continue
        pointer = int(cupy.cuda.get_current_stream().ptr)
        device = torch.device("cuda", int(array.device.id))  # type: ignore[attr-defined]
        with torch.cuda.device(device):
            # 0 is the legacy default stream, which is torch's default stream too.
            stream: Any = (
                torch.cuda.ExternalStream(pointer, device)  # type: ignore[no-untyped-call]
                if pointer
                else torch.cuda.default_stream(device)
            )
            with torch.cuda.stream(stream):
                yield
        return
    yield


def as_tensor(array: Any) -> Tensor:
    """A tensor on the memory of ``array``: a tensor, or what exports DLPack or ``__cuda_array_interface__``.

    Call it inside :func:`stream_of`, so that DLPack's hand-over finds nothing to wait for.

    Raises:
        TypeError: ``array`` exports neither.
    """
    if isinstance(array, Tensor):
        return array
    if hasattr(array, "__dlpack__"):
        tensor: Tensor = from_dlpack(array)
        return tensor
    if hasattr(array, "__cuda_array_interface__"):
        return torch.as_tensor(array, device="cuda")
    raise TypeError(f"array must export DLPack or __cuda_array_interface__, got {type(array).__name__}")


def like(tensor: Tensor, array: object) -> Any:
    """``tensor`` as an array of the library of ``array``, on the same memory. Inside :func:`stream_of`."""
    cupy = _cupy_of(array)
    return tensor if cupy is None else cupy.from_dlpack(tensor)
