"""Converts arrays of other libraries to tensors over the same memory and back, and orders their streams."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

_IMMUTABLE = ("jax", "jaxlib", "tensorflow")
"""Libraries whose arrays must never be written; their exports are not always marked read-only."""

_ON_CUDA = (2, 13)  # DLDeviceType: kDLCUDA, kDLCUDAManaged
_READ_ONLY = 1  # DLPACK_FLAG_BITMASK_READ_ONLY


class _VersionedHead(ctypes.Structure):
    """The first fields of ``DLManagedTensorVersioned``; dlpack.h promises not to move them."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
    )


def module_of(array: Any) -> str:
    """The top-level package that defines the type of ``array``."""
    return type(array).__module__.split(".")[0]


@contextlib.contextmanager
def stream_of(array: Any) -> Iterator[None]:
    """Makes CuPy's current stream on the array's device torch's current stream within the block.

    Does nothing for arrays of other libraries. CuPy's default streams, the legacy one (0, 1) and the
    per-thread one (2), become torch's default stream. CUDA keeps these in order with one another, and torch
    has no per-thread default stream.
    """
    if module_of(array) != "cupy":
        yield
        return
    number = array.device.id
    pointer = sys.modules["cupy"].cuda.get_current_stream(number).ptr
    with torch.cuda.stream(_stream(pointer, torch.device("cuda", number), per_thread=False)):
        yield


def _stream(pointer: int, device: torch.device, *, per_thread: bool) -> torch.cuda.Stream:
    """The torch stream for a ``cudaStream_t``.

    With ``per_thread``, 2 is the per-thread default stream, else torch's default stream.
    """
    if pointer in (0, 1) or (pointer == 2 and not per_thread):
        default: torch.cuda.Stream = torch.cuda.default_stream(device)
        return default
    stream: torch.cuda.Stream = torch.cuda.ExternalStream(pointer, device)  # type: ignore[no-untyped-call]
    return stream


def to_tensor(name: str, array: Any, *, written: bool = False) -> Tensor:
    """A tensor over the memory of ``array``.

    Args:
        name: name of the argument, for messages.
        array: a torch tensor, a numpy array, or anything that exports DLPack or ``__cuda_array_interface__``.
        written: whether the memory will be overwritten.

    Raises:
        TypeError: not an array.
        ValueError: read-only memory that is to be written, memory that torch cannot share, or memory on a GPU
            that is not the current one (``__cuda_array_interface__`` only).
    """
    if isinstance(array, Tensor):
        return array
    if written and module_of(array) in _IMMUTABLE:
        raise ValueError(f"{name} must be writeable, got an immutable array of {module_of(array)}")
    if module_of(array) == "numpy" and hasattr(array, "flags"):
        return _from_numpy(name, array, written)
    if hasattr(array, "__dlpack__"):
        if written and _says_read_only(array):
            raise ValueError(f"{name} must be writeable, got a read-only array ({type(array).__name__})")
        try:
            tensor: Tensor = from_dlpack(array)
        except BufferError as error:  # a refused export, for example of read-only memory before DLPack 1.0
            raise ValueError(f"{name} cannot be shared by DLPack: {error}") from error
        return tensor
    if hasattr(array, "__cuda_array_interface__"):
        return _from_cuda_interface(name, array, written)
    raise TypeError(f"{name} must export DLPack or __cuda_array_interface__, got {type(array).__name__}")


def _from_numpy(name: str, array: Any, written: bool) -> Tensor:
    if written and not array.flags.writeable:
        raise ValueError(f"{name} must be writeable, got a read-only array")
    if any(stride < 0 for stride in array.strides):
        raise ValueError(f"{name} must be contiguous, got strides {array.strides}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of read-only arrays, which are only read here
        return torch.from_numpy(array)


def _says_read_only(array: Any) -> bool:
    """Whether a DLPack export of ``array`` is marked read-only; False before DLPack 1.0, without marks."""
    options: dict[str, Any] = {"max_version": (1, 0)}
    try:
        if array.__dlpack_device__()[0] in _ON_CUDA:
            options["stream"] = -1  # the memory is not touched: no need to order streams
        capsule = array.__dlpack__(**options)
    except (AttributeError, BufferError, TypeError, ValueError):
        return False  # no answer; to_tensor finds out whether the array can be exported at all
    api = ctypes.pythonapi
    api.PyCapsule_IsValid.argtypes = [ctypes.py_object, ctypes.c_char_p]
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    if not api.PyCapsule_IsValid(capsule, b"dltensor_versioned"):
        return False
    head = _VersionedHead.from_address(api.PyCapsule_GetPointer(capsule, b"dltensor_versioned"))
    return head.major == 1 and bool(head.flags & _READ_ONLY)  # the capsule, unused, frees what it holds


def _from_cuda_interface(name: str, array: Any, written: bool) -> Tensor:
    """A tensor over an array that exports the CUDA array interface, up to version 3.

    torch's current stream waits for the stream that the interface names. The producer is not told of our
    writes: a later user of the memory on another stream must wait for torch's stream itself.
    """
    interface = array.__cuda_array_interface__
    pointer, read_only = interface["data"]
    if written and read_only:
        raise ValueError(f"{name} must be writeable, got a read-only array ({type(array).__name__})")
    if not torch.cuda.is_available():
        raise ValueError(f"{name} is in GPU memory, and torch {torch.__version__} has no CUDA device here")
    produced_on = interface.get("stream")  # None: nothing to wait for
    if produced_on == 0:  # the interface forbids it: it could mean the legacy stream or that of the thread
        raise ValueError(
            f"{name}: stream 0 in __cuda_array_interface__ is ambiguous, it must be None, 1 or 2"
        )
    tensor = torch.as_tensor(array, device="cuda")
    if tensor.numel() and tensor.data_ptr() != pointer:
        # torch copies memory of another GPU to the current one. Results would be written into the copy.
        raise ValueError(
            f"{name} is not on the current GPU, cuda:{torch.cuda.current_device()}: call this within "
            "torch.cuda.device(...) of its own"
        )
    if produced_on is not None:
        stream = _stream(produced_on, tensor.device, per_thread=True)
        torch.cuda.current_stream(tensor.device).wait_stream(stream)
    return tensor


class _InOrder:
    """Exports a tensor to CuPy by DLPack without ordering streams.

    Ordering is not needed: CuPy's current stream is torch's too, or both are default streams. It is avoided
    because torch refuses to export for the per-thread default stream (2), which CuPy may ask for.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __dlpack__(self, **options: Any) -> Any:
        return self._tensor.__dlpack__(**{**options, "stream": -1})

    def __dlpack_device__(self) -> Any:
        return self._tensor.__dlpack_device__()


def like(array: Any, tensor: Tensor) -> Any:
    """``tensor`` as an array of the library of ``array``, over the same memory.

    The tensor itself when that library cannot import it. Call this within :func:`stream_of` ``array``.
    """
    if isinstance(array, Tensor):
        return tensor
    module = module_of(array)
    if module == "numpy":
        return tensor.numpy()
    namespace: Any = sys.modules.get(module)
    if not hasattr(namespace, "from_dlpack"):
        return tensor
    # Not every library imports booleans by DLPack.
    plain = tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
    result = namespace.from_dlpack(_InOrder(plain) if module == "cupy" else plain)
    return result.view("bool") if tensor.dtype == torch.bool else result
