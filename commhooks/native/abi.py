"""The C ABI of the native libraries: structs, tables of signatures, and loading with ctypes.

The declarations follow ``csrc/include/commhooks.h``, ``commhooks_cpu.h`` and ``commhooks_cuda.h``. Three
environment variables are read: ``COMMHOOKS_NATIVE=0`` turns the libraries off, ``COMMHOOKS_LIBRARY_DIR``
names another directory to look in (for sanitizer builds), and ``COMMHOOKS_ISA`` asks the CPU library for a
lower instruction set.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .fused import Fused

_LOG = logging.getLogger(__name__)

#: ``COMMHOOKS_ABI_VERSION`` of the header. A library of another version is not used.
ABI_VERSION = 4

#: Values of ``commhooks_status`` that the callers tell apart.
INVALID, NO_MEMORY = 1, 2

#: ``commhooks_dtype`` of a gradient's dtype.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

MASK64 = 2**64 - 1

_ADDRESS = ctypes.c_void_p
_I32, _I64, _U64, _F32 = ctypes.c_int32, ctypes.c_int64, ctypes.c_uint64, ctypes.c_float


class Operands(ctypes.Structure):
    """The C struct ``commhooks_fused``: the operands of the fused pass."""

    _fields_ = (
        ("grad", _ADDRESS),
        ("residual", _ADDRESS),
        ("velocity", _ADDRESS),
        ("residual_out", _ADDRESS),
        ("velocity_out", _ADDRESS),
        ("scale_ptr", _ADDRESS),
        ("rescale", _ADDRESS),
        ("segment_offsets", _ADDRESS),
        ("active", _ADDRESS),
        ("numel", _I64),
        ("num_segments", _I32),
        ("grad_dtype", _I32),
        ("scale", _F32),
        ("momentum", _F32),
    )


class Rows(ctypes.Structure):
    """The C struct ``commhooks_rows``: rows of pairs."""

    _fields_ = (
        ("values", _ADDRESS),
        ("indices", _ADDRESS),
        ("rows", _I64),
        ("k", _I64),
        ("values_stride", _I64),
        ("indices_stride", _I64),
    )


class Messages(ctypes.Structure):
    """The C struct ``commhooks_messages``: low-bit messages."""

    _fields_ = (
        ("bytes", _ADDRESS),
        ("rows", _I64),
        ("size", _I64),
        ("stride", _I64),
        ("bits", _I32),
    )


def operands(fused: Fused, active: Tensor | None = None) -> Operands:
    """Returns the C struct of ``fused``. It holds addresses: the tensors must outlive it.

    Args:
        fused: the operands.
        active: output for which segments are active, bool ``(s,)``. None when it is not wanted.
    """
    return Operands(
        fused.grad.data_ptr(),
        fused.residual.data_ptr(),
        _address(fused.velocity),
        _address(fused.residual_out),
        _address(fused.velocity_out),
        _address(fused.scale_tensor),
        _address(fused.rescale),
        _address(fused.segments),
        _address(active),
        fused.residual.numel(),
        fused.num_segments,
        DTYPES[fused.grad.dtype],
        fused.scale,
        fused.momentum,
    )


def rows(values: Tensor, indices: Tensor) -> Rows:
    """Returns the C struct of ``values`` and ``indices``, both ``(m, k)`` with contiguous rows."""
    m, k = values.shape
    return Rows(values.data_ptr(), indices.data_ptr(), m, k, values.stride(0), indices.stride(0))


def messages(rows: Tensor, bits: int) -> Messages:
    """Returns the C struct of low-bit messages, uint8 ``(m, size)`` with contiguous rows."""
    count, size = rows.shape
    return Messages(rows.data_ptr(), count, size, rows.stride(0), bits)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


_Signature = list[Any]  # ctypes has no public type for its types

_FUSED = ctypes.POINTER(Operands)
_SELECTED = [_ADDRESS] * 3  # values, indices, report
_PAIRS = [_ADDRESS, _ADDRESS, _I64]  # values, indices, how many
_MERGED = [_ADDRESS] * 4  # values, indices, survives_a, survives_b
_ROWS = [ctypes.POINTER(Rows), _F32]  # rows, scale
_ENCODED = [_ADDRESS, _I64, _I32]  # x, its elements, bits
_MESSAGE = [_ADDRESS, _I64, _ADDRESS]  # message, its bytes, remainder
_MESSAGES = ctypes.POINTER(Messages)
_KEYS = [_U64, _U64, _U64, _I64, _I64, _ADDRESS]  # seed, step, stream, numel, k, indices
_SCRATCH = [_ADDRESS, _I64, _ADDRESS]  # scratch, its bytes, stream

#: Functions ``commhooks_cpu_*`` that return a status; the argument ``threads`` is the int32.
CPU_SIGNATURES: dict[str, _Signature] = {
    "select_topk": [_FUSED, _I64, _U64, _I32, *_SELECTED],
    "select_threshold": [_FUSED, _F32, _I64, _I64, _I32, *_SELECTED],
    "select_indices": [_FUSED, _ADDRESS, _I64, _I32, _ADDRESS, _ADDRESS],
    "sample_threshold": [_FUSED, _I64, _U64, _ADDRESS],
    "random_indices": _KEYS,
    "merge_topk": [*_PAIRS, *_PAIRS, _I64, _I32, *_MERGED],
    "contains": [_ADDRESS, _I64, _ADDRESS, _I64, _ADDRESS],
    "scatter_add": [_ADDRESS, _I64, *_ROWS],
    "write_back": [_ADDRESS, _I32, _I64, *_ROWS, _I32],
    "low_bit_encode": [*_ENCODED, _I32, *_MESSAGE],
    "low_bit_decode": [_MESSAGES, _I32, _ADDRESS, _I64],
    "low_bit_decode_add": [_MESSAGES, _I32, _ADDRESS, _I64],
    "use_isa": [ctypes.c_char_p],
}

#: Functions ``commhooks_cuda_*`` that return a status; the last argument is the stream.
CUDA_SIGNATURES: dict[str, _Signature] = {
    "select_topk": [_FUSED, _I64, _U64, *_SELECTED, *_SCRATCH],
    "select_threshold": [_FUSED, _F32, _I64, _I64, *_SELECTED, *_SCRATCH],
    "select_indices": [_FUSED, _ADDRESS, _I64, _ADDRESS, _ADDRESS, *_SCRATCH],
    "sample_threshold": [_FUSED, _I64, _U64, _ADDRESS, *_SCRATCH],
    "random_indices": [*_KEYS, *_SCRATCH],
    "merge_topk": [*_PAIRS, *_PAIRS, _I64, *_MERGED, *_SCRATCH],
    "scatter_add": [_ADDRESS, _I64, *_ROWS, _ADDRESS],
    "write_back": [_ADDRESS, _I32, _I64, *_ROWS, _ADDRESS],
    "low_bit_encode": [*_ENCODED, *_MESSAGE, _ADDRESS],
    "low_bit_decode": [_MESSAGES, _ADDRESS, _I64, _ADDRESS],
    "low_bit_decode_add": [_MESSAGES, _ADDRESS, _I64, _ADDRESS],
}


_SWITCH = {
    "1": True,
    "on": True,
    "true": True,
    "yes": True,
    "0": False,
    "off": False,
    "false": False,
    "no": False,
}


def enabled() -> bool:
    """Whether native libraries may be used (``COMMHOOKS_NATIVE``).

    Raises:
        ValueError: the variable is neither on nor off.
    """
    value = os.environ.get("COMMHOOKS_NATIVE") or "1"
    if value.lower() not in _SWITCH:
        raise ValueError(f"COMMHOOKS_NATIVE must be one of {', '.join(_SWITCH)}, got {value!r}")
    return _SWITCH[value.lower()]


def path(name: str) -> Path:
    """Returns the file of the library ``name`` ("cpu" or "cuda"), or where it is expected.

    After ``pip install .`` a checkout in the working directory is imported instead of the installed package
    but holds no libraries. Then those of the first other copy of the package on ``sys.path`` are used.

    Raises:
        ValueError: ``COMMHOOKS_LIBRARY_DIR`` names no folder.
    """
    file = f"libcommhooks_{name}" + {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
    directory = os.environ.get("COMMHOOKS_LIBRARY_DIR")
    if directory:
        if not Path(directory).is_dir():
            raise ValueError(f"COMMHOOKS_LIBRARY_DIR must be a folder, got {directory!r}")
        return Path(directory) / file
    own = Path(__file__).parent / "lib" / file
    others = (Path(entry, *__package__.split("."), "lib", file) for entry in sys.path)
    return own if own.is_file() else next((other for other in others if other.is_file()), own)


@functools.cache
def cpu() -> ctypes.CDLL | None:
    """Loads the CPU library with its prototypes. None: it is switched off, missing or unusable.

    Raises:
        ValueError: an environment variable has an invalid value.
    """
    if enabled() and not path("cpu").is_file():
        _LOG.warning("%s is missing: kernels run as torch operators, much slower", path("cpu"))
    loaded = _load("cpu")
    if loaded is None:
        return None
    declare_cpu(loaded)
    asked = os.environ.get("COMMHOOKS_ISA") or None
    if asked is not None and loaded.commhooks_cpu_use_isa(asked.encode()) != 0:
        raise ValueError(
            "COMMHOOKS_ISA must be an instruction set that this machine and library have (avx512, avx2, "
            f"neon, scalar), got {asked!r}"
        )
    return loaded


@functools.cache
def cuda() -> ctypes.CDLL | None:
    """Loads the CUDA library with its prototypes. None: it is switched off, missing or unusable."""
    loaded = _load("cuda")
    return None if loaded is None else declare_cuda(loaded)


def declare_cpu(loaded: ctypes.CDLL) -> ctypes.CDLL:
    """Sets the prototypes of the CPU library on ``loaded`` and returns it."""
    _declare(loaded, "cpu", CPU_SIGNATURES)
    loaded.commhooks_cpu_isa.restype = ctypes.c_char_p
    return loaded


def declare_cuda(loaded: ctypes.CDLL) -> ctypes.CDLL:
    """Sets the prototypes of the CUDA library on ``loaded`` and returns it."""
    _declare(loaded, "cuda", CUDA_SIGNATURES)
    loaded.commhooks_cuda_scratch_bytes.argtypes = [_I32, _I64, _I64, _I64]
    loaded.commhooks_cuda_scratch_bytes.restype = _I64
    loaded.commhooks_cuda_last_error.argtypes = []
    loaded.commhooks_cuda_last_error.restype = ctypes.c_char_p
    return loaded


def _declare(loaded: ctypes.CDLL, name: str, signatures: dict[str, _Signature]) -> None:
    for function_name, arguments in signatures.items():
        # getattr caches the function object in the library. loaded[...] would make a new one each time.
        function = getattr(loaded, f"commhooks_{name}_{function_name}")
        function.argtypes = arguments
        function.restype = _I32


def _load(name: str) -> ctypes.CDLL | None:
    file = path(name)
    if not enabled() or not file.is_file():
        return None
    try:
        loaded = ctypes.CDLL(str(file))
    except OSError as error:
        _LOG.warning("%s could not be loaded, using torch operators instead: %s", file, error)
        return None
    version_of = getattr(loaded, f"commhooks_{name}_abi_version", None)
    if version_of is None:
        _LOG.warning("%s is no library of commhooks (it tells no ABI version): not used", file)
        return None
    version_of.restype = _I32
    if version_of() != ABI_VERSION:
        _LOG.warning("%s has ABI version %d, expected %d: not used", file, version_of(), ABI_VERSION)
        return None
    return loaded


def isa() -> str | None:
    """Returns the CPU library's instruction set: "avx512", "avx2", "neon", "scalar". None: no library."""
    loaded = cpu()
    if loaded is None:
        return None
    name: bytes = loaded.commhooks_cpu_isa()
    return name.decode()


def use_isa(name: str | None) -> None:
    """Switches the CPU library to instruction set ``name`` (None: the best), for tests and benchmarks.

    Raises:
        ValueError: this machine or library does not have it.
    """
    loaded = cpu()
    if loaded is None or loaded.commhooks_cpu_use_isa(None if name is None else name.encode()) != 0:
        raise ValueError(f"instruction set {name!r} is not available")


def describe() -> dict[str, str]:
    """Tells which kernels, libraries and versions are in use, as label and text, for ``commhooks info``."""
    native_cpu, native_cuda = cpu(), cuda()
    return {
        "cpu kernels": f"native ({isa()})"
        if native_cpu is not None
        else f"torch operators ({why_not('cpu')})",
        "cpu library": str(path("cpu")) if native_cpu is not None else "not in use",
        "cuda kernels": "native" if native_cuda is not None else f"torch operators ({why_not('cuda')})",
        "cuda library": str(path("cuda")) if native_cuda is not None else "not in use",
        "cuda devices": str(torch.cuda.device_count()) if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def why_not(name: str) -> str | None:
    """Returns why the library ``name`` (``"cpu"`` or ``"cuda"``) is not in use. None where it is."""
    if (cuda() if name == "cuda" else cpu()) is not None:
        return None
    if not enabled():
        return "COMMHOOKS_NATIVE=0"
    file = path(name)
    return f"no usable library: {file} {'cannot be loaded here' if file.is_file() else 'was not built'}"
