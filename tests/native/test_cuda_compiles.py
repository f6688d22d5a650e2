"""Where nvcc is at hand the CUDA library builds: no warning, all symbols, the targets that were asked for."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from cuda_tools import nvdisasm

from commhooks.native.abi import ABI_VERSION

ROOT = Path(__file__).resolve().parents[2]
TARGETS = os.environ.get("COMMHOOKS_TEST_CUDA_TARGETS", "90")  # scripts/build_cuda_all takes them all


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_builds_through_cmake(tmp_path: Path) -> None:
    if shutil.which("nvcc") is None or shutil.which("cmake") is None:
        pytest.skip("no nvcc or no cmake")
    configure = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-DCOMMHOOKS_CUDA=ON"]
    configure += [
        f"-DCOMMHOOKS_CUDA_ARCHITECTURES={TARGETS}",
        "-DCMAKE_BUILD_TYPE=Release",
        "-DCOMMHOOKS_WERROR=ON",
    ]
    build = ["cmake", "--build", str(tmp_path), "--target", "commhooks_cuda", "-j2"]
    for command in (configure, build):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (library,) = tmp_path.rglob("libcommhooks_cuda.so")
    loaded = ctypes.CDLL(str(library))  # also where there is no driver: the runtime is linked in
    assert loaded.commhooks_cuda_abi_version() == ABI_VERSION
    loaded.commhooks_cuda_scratch_bytes.restype = ctypes.c_int64
    size = loaded.commhooks_cuda_scratch_bytes(
        0, ctypes.c_int64(10**8), ctypes.c_int64(10**5), ctypes.c_int64(0)
    )
    assert 10**8 // 8 < size < 10**8 // 4
    assert (
        loaded.commhooks_cuda_scratch_bytes(9, ctypes.c_int64(1), ctypes.c_int64(1), ctypes.c_int64(0)) == -1
    )
    if shutil.which("cuobjdump") is None:
        return
    listed = subprocess.run(
        ["cuobjdump", "--list-elf", "--list-ptx", str(library)], capture_output=True, text=True
    )
    for target in TARGETS.split(";"):
        assert f"sm_{target}" in listed.stdout


@pytest.mark.nvcc
@pytest.mark.timeout(300)
@pytest.mark.parametrize("target", ["80", "90"])
def test_the_pass_stores_whole_vectors(tmp_path: Path, target: str) -> None:
    """A lane writes its 16 elements by four stores of 16 bytes; compilers have made one of them four of 4 bytes.

    There are three kernels without velocity and three with it. Each has one path for whole tiles and one for the
    others.
    """
    tool = nvdisasm()
    assert tool is not None
    cubin = tmp_path / "pass.cubin"
    compiled = ["nvcc", "-cubin", f"-arch=sm_{target}", "-std=c++17", "-O3", "-fmad=false"]
    compiled += [f"-I{ROOT / 'csrc' / 'cuda'}", f"-I{ROOT / 'csrc' / 'include'}", "-o", str(cubin)]
    for command in ([*compiled, str(ROOT / "csrc" / "cuda" / "pass.cu")], [tool, "-c", str(cubin)]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    stores: Counter[str] = Counter()
    kernel = ""
    for line in done.stdout.splitlines():
        if line.startswith(".text."):
            kernel = line
        if "STG.E.128" in line:
            stores[kernel] += 1
    assert sorted(stores.values()) == [8, 8, 8, 16, 16, 16]
