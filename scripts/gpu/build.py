"""Builds what the checks need: the CUDA library, the CPU library, CUB's rival; in a dry run the emulator.

The CUDA library is built by nvcc alone, for the GPU at hand: one command and no generator. The CPU library goes through
CMake where CMake and a build tool are there, for its vector kernels; otherwise a C++ compiler makes the scalar ones.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from gpu.machine import ROOT, tool
from gpu.runner import Command, Job, Runner, Skipped, TimedOut

CSRC = ROOT / "csrc"
RIVAL = ROOT / "scripts" / "benchmarks" / "kernels" / "cub_rival.cu"
DRY_TARGET = "90"
CUDA_FLAGS = ("-std=c++17", "-O3", "-shared", "-cudart=static", "-fmad=false", "-lineinfo", "-Xptxas=-v")


def libraries(runner: Runner) -> Path:
    """The folder of the libraries that were built here (``COMMHOOKS_LIBRARY_DIR``)."""
    return runner.work / "lib"


def emulated(runner: Runner) -> Path:
    """The CUDA kernels compiled for the CPU, in a dry run."""
    return runner.work / "emulated" / "libcommhooks_cuda_emulated.so"


def target(runner: Runner) -> str:
    """The GPU's architecture: "90"."""
    return str(runner.about.get("compute_capability", DRY_TARGET)).replace(".", "")


def build(job: Job) -> str:
    """Both libraries side by side; CUB's rival goes on in the background, until the benchmark asks for it."""
    folder = libraries(job.runner)
    folder.mkdir(parents=True, exist_ok=True)
    rival = rival_command(job.runner)
    nvcc, cpu = cuda_command(job.runner), cpu_commands(job.runner)
    if job.dry:
        for command in (nvcc, *cpu, *([rival] if rival else [])):
            job.show(command)
        return _emulator(job)
    if tool("nvcc") is None:
        raise RuntimeError("no nvcc on PATH or in /usr/local/cuda")
    if rival is not None:
        job.runner.background["rival"] = job.start(rival, job.runner.logs / "cub-rival.log")
    cuda = job.start(nvcc, job.runner.logs / "nvcc.log")
    try:
        said = _cpu_library(job, cpu)
    finally:
        cuda.wait(job.left_s())
    return f"sm_{target(job.runner)} by nvcc; CPU library: {said}; CUB's rival: {'started' if rival else 'no CUB headers'}"


def cuda_command(runner: Runner) -> list[str]:
    """nvcc's, for the GPU at hand."""
    sources = [str(path) for path in sorted((CSRC / "cuda").rglob("*.cu"))]
    return [
        tool("nvcc") or "nvcc", *CUDA_FLAGS, f"-arch=sm_{target(runner)}", "-Xcompiler=-fPIC,-fvisibility=hidden",
        "-Xlinker=--exclude-libs=ALL", f"-I{CSRC / 'cuda'}", f"-I{CSRC / 'include'}", f"--threads={os.cpu_count() or 1}",
        "-o", str(libraries(runner) / "libcommhooks_cuda.so"), *sources,
    ]  # fmt: skip


def cpu_commands(runner: Runner) -> list[list[str]]:
    """Configure and build by CMake, or a compiler's command alone where CMake or its build tool is missing."""
    cmake, folder = tool("cmake"), runner.work / "cmake-cpu"
    for name, generator in (("ninja", "Ninja"), ("make", "Unix Makefiles")):
        by = tool(name)
        if cmake is not None and by is not None:
            configure = [
                cmake,
                "-S",
                str(ROOT),
                "-B",
                str(folder),
                "-G",
                generator,
                f"-DCMAKE_MAKE_PROGRAM={by}",
            ]
            configure += ["-DCMAKE_BUILD_TYPE=Release", "-DCOMMHOOKS_CUDA=OFF"]
            jobs = str(os.cpu_count() or 1)
            return [configure, [cmake, "--build", str(folder), "--target", "commhooks_cpu", "-j", jobs]]
    vector = ("kernels_avx2", "kernels_avx512", "kernels_neon")
    sources = [str(path) for path in sorted((CSRC / "cpu").rglob("*.cpp")) if path.stem not in vector]
    headers = sorted({path.parent for path in (CSRC / "cpu").rglob("*.h")})
    flags = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared", "-pthread"]
    includes = [f"-I{path}" for path in (CSRC / "cpu", CSRC / "include", *headers)]
    out = libraries(runner) / "libcommhooks_cpu.so"
    return [[tool("g++") or "c++", *flags, *includes, "-o", str(out), *sources]]


def _cpu_library(job: Job, commands: list[list[str]]) -> str:
    """Builds it. Without it the CPU sides run as torch operators, which is told and no failure."""
    log = job.runner.logs / "cpu-library.log"
    try:
        for command in commands:
            job.start(command, log).wait(job.left_s())
    except (OSError, RuntimeError) as error:
        return f"torch operators instead ({str(error)[-300:]})"
    if len(commands) == 1:
        return "scalar kernels (no CMake, or neither Ninja nor make)"
    (built,) = (job.runner.work / "cmake-cpu").rglob("libcommhooks_cpu.so")
    shutil.copy2(built, libraries(job.runner))
    return "CMake"


def find_cub() -> Path | None:
    """Include folder with CUB's DeviceTopK, from the nvidia-cuda-cccl package or the toolkit."""
    folders = [
        Path(entry) / "nvidia" / "cu13" / "include" / "cccl" for entry in (*sys.path, str(ROOT / ".cccl"))
    ]
    nvcc = tool("nvcc")
    if nvcc is not None:
        folders.append(Path(nvcc).resolve().parents[1] / "include" / "cccl")
    for folder in folders:
        if (folder / "cub" / "device" / "device_topk.cuh").is_file():
            return folder
    return None


def rival_command(runner: Runner) -> list[str] | None:
    """nvcc's command for CUB's rival; None without CUB's headers (in a dry run it is shown all the same)."""
    include = find_cub()
    if include is None and not runner.dry:
        return None
    command = [tool("nvcc") or "nvcc", "-std=c++17", "-O3", "-shared", "-cudart=static", "-Xcompiler=-fPIC"]
    command += [f"-arch=sm_{target(runner)}", f"-I{include or 'CCCL'}", str(RIVAL)]
    return [*command, "-o", str(libraries(runner) / "cub_rival.so")]


def rival(job: Job) -> tuple[list[str], str]:
    """The benchmark's arguments for CUB, once it is compiled, and what to say about it."""
    started: Command | None = job.runner.background.pop("rival", None)
    library = libraries(job.runner) / "cub_rival.so"
    if started is not None:
        try:
            started.wait(min(60.0, job.left_s()))
        except (RuntimeError, TimedOut) as error:
            return [], f"without CUB, which did not compile: {str(error)[-500:]}"
    if not library.is_file():
        return [], "without CUB: no header device_topk.cuh (nvidia-cuda-cccl >= 13.2.86)"
    return ["--cub", str(library)], "with CUB"


def _emulator(job: Job) -> str:
    """Builds the kernels for the CPU, unless what is there is newer than the sources."""
    file = ROOT / "tests" / "native" / "emulator" / "build.py"
    spec = importlib.util.spec_from_file_location("emulator_build", file)
    assert spec is not None and spec.loader is not None
    emulator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(emulator)
    library = emulated(job.runner)
    library.parent.mkdir(parents=True, exist_ok=True)
    reason = emulator.why_not(library.parent)
    if reason is not None:
        raise Skipped(f"no GPU, and nothing can be emulated: {reason}")
    sources = [*(CSRC / "cuda").rglob("*.cu*"), *emulator.HERE.iterdir()]
    if not library.is_file() or library.stat().st_mtime < max(path.stat().st_mtime for path in sources):
        emulator.build(library.parent)
    return "the kernels as the emulator runs them, on the CPU"
