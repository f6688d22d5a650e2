"""Builds the CUDA kernels for the host: ``csrc/cuda`` against ``simt.h``, with an ordinary C++ compiler."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[2] / "csrc"
COMPILERS = ("g++", "clang++", "c++")


def compiler() -> list[str]:
    """The C++ compiler as a command; empty when there is none."""
    named = shlex.split(os.environ.get("CXX", ""))
    return named or [name for name in COMPILERS if shutil.which(name)][:1]


def why_not(folder: Path) -> str | None:
    """Why nothing can be emulated here, or None. Writes a probe into ``folder``."""
    if not compiler():
        return "no C++ compiler"
    probe = folder / "probe.cpp"
    probe.write_text("#include <ucontext.h>\n_Float16 half(float x) { return static_cast<_Float16>(x); }\n")
    command = [*compiler(), "-std=c++17", "-c", str(probe), "-o", str(folder / "probe.o")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    return None if done.returncode == 0 else f"{compiler()[0]} has no _Float16 or there is no ucontext.h"


def build(folder: Path, *, misses: bool = False, races: bool = False) -> Path:
    """The library in ``folder``; ``misses``: poor guesses; ``races``: for ThreadSanitizer, which must be preloaded.

    Raises:
        RuntimeError: with the compiler's words.
    """
    folder.mkdir(parents=True, exist_ok=True)
    common = ["-std=c++17", "-O1", "-g", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    common += [
        "-ffp-contract=off",
        "-DCOMMHOOKS_EMULATE",
        f"-I{HERE}",
        f"-I{CSRC / 'cuda'}",
        f"-I{CSRC / 'include'}",
    ]
    if misses:
        common.append("-DCOMMHOOKS_TEST_MISSES")
    if races:
        common.append("-DCOMMHOOKS_EMULATE_RACES")
    objects = []
    for source in [HERE / "simt.cpp", *sorted((CSRC / "cuda").glob("*.cu"))]:
        target = folder / f"{source.stem}.o"
        own = ["-fsanitize=thread"] if races and source.suffix == ".cu" else []
        _run([*compiler(), *common, *own, "-x", "c++", "-c", str(source), "-o", str(target)])
        objects.append(str(target))
    library = folder / "libcommhooks_cuda_emulated.so"
    sanitizer = ["-fsanitize=thread"] if races else []
    _run([*compiler(), "-shared", *sanitizer, "-o", str(library), *objects, "-lpthread"])
    return library


def _run(command: list[str]) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
