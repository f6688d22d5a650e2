"""Builds the native libraries with CMake; everything else stands in pyproject.toml.

Environment variables of the build:
    COMMHOOKS_BUILD_NATIVE=0   leave the libraries out (kernels then run as torch operators)
    COMMHOOKS_CUDA=ON|OFF      insist on the CUDA library, or leave it out. Default AUTO: build it when CMake finds a
                               CUDA compiler (a development install also wants to see a device, to stay quick)
    COMMHOOKS_CMAKE_ARGS       further arguments for CMake's configuration
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
LIBRARIES = Path("commhooks", "native", "lib")
COMPILERS = ("c++", "g++", "clang++", "cl")


def warn(message: str) -> None:
    """Says it on stderr, in a frame that is hard to miss, and on the terminal: pip shows stderr only with -v."""
    line = "*" * 100
    print(f"\n{line}\ncommhooks: WARNING: {message}\n{line}\n", file=sys.stderr, flush=True)
    if not sys.stderr.isatty():
        say_on_terminal(f"\r\ncommhooks: WARNING: {message}\r\n")


def say_on_terminal(text: str) -> None:
    """Writes to the controlling terminal when this build has one and runs in its foreground; never fails."""
    try:
        terminal = os.open("/dev/tty", os.O_WRONLY | os.O_NOCTTY)
    except (OSError, AttributeError):  # none here, or not POSIX
        return
    try:
        # From the background a terminal with `stty tostop` would stop the build instead of showing anything.
        if os.tcgetpgrp(terminal) == os.getpgrp():
            os.write(terminal, text.encode())
    except OSError:
        pass
    finally:
        os.close(terminal)


class BuildLibraries(build_ext):
    """Runs CMake and puts the libraries into commhooks/native/lib of the wheel or, in place, of the checkout."""

    def run(self) -> None:
        reason = self.why_not()
        if reason is not None:
            warn(
                f"{reason}. Installing WITHOUT the native kernels: torch operators take their place, much slower."
            )
            return
        in_place = bool(self.inplace or getattr(self, "editable_mode", False))
        build = ROOT / "build" / "in-place" if in_place else Path(self.build_temp).resolve() / "cmake"
        target = (ROOT if in_place else Path(self.build_lib).resolve()) / LIBRARIES
        cuda = self.cuda_mode(in_place)
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCOMMHOOKS_CUDA={cuda}",
        ]
        if shutil.which("ninja") and not (build / "CMakeCache.txt").exists():
            configure += ["-G", "Ninja"]
        subprocess.run([*configure, *shlex.split(os.environ.get("COMMHOOKS_CMAKE_ARGS", ""))], check=True)
        self.build_target(build, "commhooks_cpu", target)
        if cuda != "OFF" and "commhooks_cuda" in self.targets(build):
            try:
                self.build_target(build, "commhooks_cuda", target)
            except subprocess.CalledProcessError:
                if cuda == "ON":
                    raise
                warn("the CUDA library could not be built (output above). Installing without it.")

    @staticmethod
    def why_not() -> str | None:
        """Why nothing can be compiled here, or None."""
        wanted = os.environ.get("COMMHOOKS_BUILD_NATIVE") or "1"
        if wanted not in ("0", "1"):
            raise ValueError(f"COMMHOOKS_BUILD_NATIVE must be 0 or 1, got {wanted!r}")
        if wanted == "0":
            return "COMMHOOKS_BUILD_NATIVE=0"
        if shutil.which("cmake") is None:
            return "CMake was not found"
        compiler = shlex.split(os.environ.get("CXX", "")) or [
            name for name in COMPILERS if shutil.which(name)
        ]
        if not compiler or shutil.which(compiler[0]) is None:
            return "no C++ compiler was found (CXX, " + ", ".join(COMPILERS) + ")"
        return None

    @staticmethod
    def cuda_mode(in_place: bool) -> str:
        mode = os.environ.get("COMMHOOKS_CUDA", "AUTO").upper()
        if mode not in ("AUTO", "ON", "OFF"):
            raise ValueError(f"COMMHOOKS_CUDA must be AUTO, ON or OFF, got {mode!r}")
        if mode == "AUTO" and in_place and not Path("/dev/nvidiactl").exists():
            return "OFF"
        return mode

    @staticmethod
    def targets(build: Path) -> str:
        command = ["cmake", "--build", str(build), "--target", "help"]
        return subprocess.run(command, check=False, capture_output=True, text=True).stdout

    @staticmethod
    def build_target(build: Path, name: str, target: Path) -> None:
        jobs = str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
        subprocess.run(["cmake", "--build", str(build), "--target", name, "--parallel", jobs], check=True)
        target.mkdir(parents=True, exist_ok=True)
        for suffix in (".so", ".dylib", ".dll"):
            for built in build.rglob(f"lib{name}{suffix}"):
                # Replaced, not overwritten: a process may have the old one mapped.
                fresh = target / f".{built.name}.new"
                shutil.copy2(built, fresh)
                os.replace(fresh, target / built.name)

    def get_outputs(self) -> list[str]:
        return [str(path) for path in (Path(self.build_lib) / LIBRARIES).glob("lib*")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class PlatformWheel(bdist_wheel):
    """The libraries use neither Python's nor torch's ABI: one wheel for every version of both."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


class NativeDistribution(Distribution):
    """Has libraries of a platform, though no extension modules."""

    def has_ext_modules(self) -> bool:
        return True


setup(
    ext_modules=[Extension("commhooks.native.lib", sources=[])],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": PlatformWheel},
    distclass=NativeDistribution,
)
