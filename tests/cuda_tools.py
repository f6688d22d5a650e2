"""Programs that look at compiled CUDA kernels."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path


def nvdisasm() -> str | None:
    """The disassembler: on PATH, in the toolkit, or from the wheel ``nvidia-cuda-nvdisasm``."""
    folders = ["/usr/local/cuda/bin", *(str(Path(entry) / "nvidia" / "cu13" / "bin") for entry in sys.path)]
    return shutil.which("nvdisasm") or shutil.which("nvdisasm", path=os.pathsep.join(folders))


def why_no_nvcc() -> str | None:
    """None if kernels can be compiled and disassembled here, otherwise the reason."""
    if shutil.which("nvcc") is None:
        return "no nvcc"
    return None if nvdisasm() is not None else "no nvdisasm: pip install nvidia-cuda-nvdisasm"
