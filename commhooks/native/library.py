"""Finds and loads the native libraries. Never compiles anything.

``COMMHOOKS_NATIVE=0`` turns them off, ``COMMHOOKS_LIBRARY_DIR`` names another directory to look in (for sanitizer
builds), ``COMMHOOKS_ISA`` asks the CPU library for a lower instruction set.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import platform
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch

_LOG = logging.getLogger(__name__)

#: Of csrc/include/commhooks.h; a library of another version is not used.
ABI_VERSION = 2

_POINTER = ctypes.c_void_p
_I32 = ctypes.c_int32
_I64 = ctypes.c_int64
_U64 = ctypes.c_uint64
_F32 = ctypes.c_float

_CPU_FUNCTIONS: dict[str, list[object]] = {
    "select_topk": [_POINTER, _I64, _U64, _I32, _POINTER, _POINTER, _POINTER],
    "select_threshold": [_POINTER, _F32, _I64, _I64, _I32, _POINTER, _POINTER, _POINTER],
    "select_indices": [_POINTER, _POINTER, _I64, _I32, _POINTER, _POINTER],
    "sample_threshold": [_POINTER, _I64, _U64, _POINTER],
    "random_indices": [_U64, _U64, _U64, _I64, _I64, _POINTER],
    "merge_topk": [
        _POINTER,
        _POINTER,
        _I64,
        _POINTER,
        _POINTER,
        _I64,
        _I64,
        _I32,
        _POINTER,
        _POINTER,
        _POINTER,
        _POINTER,
    ],
    "contains": [_POINTER, _I64, _POINTER, _I64, _POINTER],
    "scatter_add": [_POINTER, _I64, _POINTER, _POINTER, _I64, _F32],
    "write_back": [_POINTER, _I32, _I64, _POINTER, _POINTER, _I64, _I64, _F32, _I32],
    "use_isa": [ctypes.c_char_p],
}


def enabled() -> bool:
    """Whether native libraries may be used (``COMMHOOKS_NATIVE``)."""
    return os.environ.get("COMMHOOKS_NATIVE", "1").lower() not in ("0", "off", "false", "no")


def path(name: str) -> Path:
    """Where the library ``name`` ("cpu" or "cuda") is expected."""
    directory = os.environ.get("COMMHOOKS_LIBRARY_DIR") or Path(__file__).parent / "lib"
    suffix = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
    return Path(directory) / f"libcommhooks_{name}{suffix}"


def _load(name: str) -> ctypes.CDLL | None:
    file = path(name)
    if not enabled() or not file.is_file():
        return None
    try:
        loaded = ctypes.CDLL(str(file))
    except OSError as error:
        _LOG.warning("%s could not be loaded, using torch operators instead: %s", file, error)
        return None
    version_of = getattr(loaded, f"commhooks_{name}_abi_version")
    version_of.restype = _I32
    if version_of() != ABI_VERSION:
        _LOG.warning("%s has ABI version %d, expected %d: not used", file, version_of(), ABI_VERSION)
        return None
    return loaded


@functools.cache
def cpu() -> ctypes.CDLL | None:
    """The CPU library with its prototypes set, or None."""
    loaded = _load("cpu")
    if loaded is None:
        if enabled() and not path("cpu").is_file():
            _LOG.warning("%s is missing: kernels run as torch operators, much slower", path("cpu"))
        return None
    for name, arguments in _CPU_FUNCTIONS.items():
        function = getattr(loaded, f"commhooks_cpu_{name}")
        function.argtypes = arguments
        function.restype = _I32
    loaded.commhooks_cpu_isa.restype = ctypes.c_char_p
    return loaded


@functools.cache
def cuda() -> ctypes.CDLL | None:
    """The CUDA library, or None; its prototypes are set by ``commhooks.native.cuda``."""
    return _load("cuda")


@functools.cache
def cuda_module() -> ModuleType:
    """The functions that call the CUDA library."""
    return import_module("commhooks.native.cuda")


def isa() -> str | None:
    """Instruction set of the CPU library: "avx512", "avx2", "neon" or "scalar"; None without the library."""
    loaded = cpu()
    if loaded is None:
        return None
    name: bytes = loaded.commhooks_cpu_isa()
    return name.decode()


def use_isa(name: str | None) -> None:
    """Switches the CPU library to instruction set ``name`` (None: the best); for tests and benchmarks.

    Raises:
        ValueError: this machine or library does not have it.
    """
    loaded = cpu()
    if loaded is None or loaded.commhooks_cpu_use_isa(None if name is None else name.encode()) != 0:
        raise ValueError(f"instruction set {name!r} is not available")


def describe() -> dict[str, str]:
    """Which implementation is in use, for ``python -m commhooks info``."""
    native_cpu, native_cuda = cpu(), cuda()
    missing = "COMMHOOKS_NATIVE=0" if not enabled() else "no usable library"
    return {
        "cpu kernels": f"native ({isa()})" if native_cpu is not None else f"torch operators ({missing})",
        "cpu library": str(path("cpu")) if native_cpu is not None else "not in use",
        "cuda kernels": "native" if native_cuda is not None else f"torch operators ({missing})",
        "cuda library": str(path("cuda")) if native_cuda is not None else "not in use",
        "cuda devices": str(torch.cuda.device_count()) if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
