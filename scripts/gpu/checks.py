"""The checks of gpu_check: each takes the report that runs its commands and returns a line on what it saw."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness.records import load

from gpu.report import Report, Skipped, TimedOut

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "gpu"
LIBRARY = BUILD / "libcommhooks_cuda.so"
FIGURES = BUILD / "kernels.jsonl"
#: In the mangled name of each of our kernels, and of no other.
NAMESPACE = "commhooks"


def tool(name: str) -> str | None:
    """A program on PATH, beside this Python, or of the CUDA toolkit."""
    cuda = [folder for folder in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if folder]
    folders = [
        str(Path(sys.executable).parent),
        *(f"{c}/{part}" for c in cuda for part in ("bin", "compute-sanitizer")),
    ]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


def run(report: Report, command: list[str], limit_s: float, **environment: str) -> str:
    """A command in the checkout, with the library that was built here."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return report.run(
        command, limit_s, ROOT, {"PYTHONPATH": paths, "COMMHOOKS_LIBRARY_DIR": str(BUILD), **environment}
    )


def generator() -> tuple[str, list[str]] | None:
    """A build tool for CMake that is here and CMake's arguments for it; None: nvcc has to do without."""
    for name, arguments in (("ninja", ["-G", "Ninja"]), ("make", ["-G", "Unix Makefiles"])):
        found = tool(name)
        if found is not None:
            return name, [*arguments, f"-DCMAKE_MAKE_PROGRAM={found}"]
    return None


def build(report: Report, capability: tuple[int, int]) -> str:
    """CMake with Ninja or make; nvcc alone where there is neither, or where CMake cannot configure."""
    nvcc = tool("nvcc")
    if nvcc is None:
        raise RuntimeError("no nvcc on PATH or in /usr/local/cuda")
    target = f"{capability[0]}{capability[1]}"
    BUILD.mkdir(parents=True, exist_ok=True)
    cmake, by = tool("cmake"), generator()
    jobs, why = str(os.cpu_count() or 1), "no CMake, or neither Ninja nor make"
    if cmake is not None and by is not None:
        folder = BUILD / f"cmake-{by[0]}"
        configure = [
            cmake,
            "-S",
            str(ROOT / "csrc" / "cuda"),
            "-B",
            str(folder),
            *by[1],
            "-DCMAKE_BUILD_TYPE=Release",
        ]
        configure += [f"-DCOMMHOOKS_CUDA_ARCHITECTURES={target}", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
        try:
            run(report, configure, 40)
        except RuntimeError as error:
            why = f"CMake could not configure: {str(error)[-500:]}"
        else:
            run(report, [cmake, "--build", str(folder), "-j", jobs], 90)
            shutil.copy2(folder / LIBRARY.name, LIBRARY)
            return f"CMake with {by[0]}, sm_{target}"
    sources = [str(path) for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]
    run(
        report,
        [nvcc, "-std=c++17", "-O3", "-shared", "-cudart=static", "-fmad=false", f"-arch=sm_{target}",
         "-Xcompiler=-fPIC,-fvisibility=hidden", f"-I{ROOT}/csrc/cuda", f"-I{ROOT}/csrc/include",
         "--threads", jobs, "-o", str(LIBRARY), *sources], 100,
    )  # fmt: skip
    return f"nvcc, sm_{target} ({why})"


def native_tests(report: Report) -> str:
    """The kernels against the reference: by pytest, or the main comparisons without it."""
    if importlib.util.find_spec("pytest") is None:
        said = run(report, [sys.executable, "tests/native/cuda_runs.py", "all", "--device", "cuda"], 130)
        return f"without pytest: {said.strip().splitlines()[-1]}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5"]
    said = run(report, [*command, "tests/native/test_cuda.py"], 130)
    last = said.strip().splitlines()[-1]
    if " passed" not in last:
        raise RuntimeError(f"no test passed: {said[-3000:]}")
    return last


def ddp(report: Report) -> str:
    return run(report, [sys.executable, "scripts/gpu/ddp_check.py"], 90).strip()


def only_ours(report: Report, sanitizer: str) -> list[str]:
    """Arguments that keep a sanitizer to our kernels: instrumenting all of torch's takes minutes."""
    said = run(report, [sanitizer, "--help"], 20)
    for option in ("--kernel-name", "--kernel-regex"):  # the latter is what older toolkits call it
        if option in said:
            return [option, f"kns={NAMESPACE}"]
    return []


def sanitize(report: Report, kind: str, what: str, limit_s: float) -> str:
    """One tool of compute-sanitizer on small sizes; memcheck must also see a fault that is made on purpose."""
    found = tool("compute-sanitizer")
    if found is None:
        raise Skipped("no compute-sanitizer")
    command = [found, "--tool", kind, "--error-exitcode", "9", *only_ours(report, found)]
    if kind == "memcheck":
        command += ["--report-api-errors", "no"]
    command += [sys.executable, "tests/native/cuda_runs.py"]
    # Without torch's cache each tensor is an allocation of its own, so that leaving it is seen.
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    said = run(report, [*command, what, "--device", "cuda"], limit_s, **alone)
    if kind == "memcheck":
        try:
            seen = run(report, [*command, "fault", "--device", "cuda"], limit_s, **alone)
        except RuntimeError as error:  # the program fails of it too
            seen = str(error)
        if re.search(r"ERROR SUMMARY: [1-9]", seen) is None:
            raise RuntimeError(
                f"{' '.join(command)} did not see a read out of bounds in our kernel: {seen[-1000:]}"
            )
    return " ".join(said.strip().splitlines()[-2:])


def find_cub() -> Path | None:
    """Include folder with CUB's DeviceTopK, from the nvidia-cuda-cccl package or the toolkit."""
    folders = [Path(entry) / "nvidia" / "cu13" / "include" / "cccl" for entry in sys.path]
    nvcc = tool("nvcc")
    if nvcc is not None:
        folders.append(Path(nvcc).resolve().parents[1] / "include" / "cccl")
    for folder in folders:
        if (folder / "cub" / "device" / "device_topk.cuh").is_file():
            return folder
    return None


def build_rival(report: Report, capability: tuple[int, int]) -> tuple[list[str], str]:
    """The benchmark's arguments for CUB, and what to say about it."""
    include = find_cub()
    if include is None:
        return [], "without CUB: no header device_topk.cuh (nvidia-cuda-cccl >= 13.2.86)"
    library = BUILD / "cub_rival.so"
    command = [tool("nvcc") or "nvcc", "-std=c++17", "-O3", "-shared", "-cudart=static", "-Xcompiler=-fPIC"]
    command += [f"-arch=sm_{capability[0]}{capability[1]}", f"-I{include}", "scripts/benchmarks/cub_rival.cu"]
    try:
        run(report, [*command, "-o", str(library)], 60)
    except (RuntimeError, TimedOut) as error:
        return [], f"without CUB, which did not compile: {str(error)[-500:]}"
    return ["--cub", str(library)], f"with CUB from {include}"


def benchmark(report: Report, quick: bool, capability: tuple[int, int]) -> str:
    """`scripts/bench kernels --device cuda`; what it measured is kept, whether or not it comes to its end."""
    FIGURES.unlink(missing_ok=True)
    rival, about_rival = build_rival(report, capability)
    command = [sys.executable, "scripts/bench", "kernels", "--device", "cuda", "--json", str(FIGURES), *rival]
    print(run(report, command + (["--quick"] if quick else []), 150))
    return f"{len(figures())} records, {about_rival}"


def figures() -> list[dict[str, Any]]:
    """The records that the benchmark of this run has saved so far."""
    return load(FIGURES) if FIGURES.is_file() else []
