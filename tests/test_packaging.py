"""The wheel: built in isolation without torch, for every Python and torch, and without a compiler."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import commhooks

ROOT = Path(__file__).resolve().parents[1]


def test_the_version_stands_in_one_place() -> None:
    """The build reads it from the package's source, without importing torch, which a build has not."""
    program = (
        "import sys; from setuptools.config.pyprojecttoml import read_configuration\n"
        "print(read_configuration('pyproject.toml')['project']['version'], 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [commhooks.__version__, "False"]


def test_workflows_run_scripts_that_exist() -> None:
    files = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    commands = [found for file in files for found in re.findall(r"^ *- run: (\S+)", file.read_text(), re.M)]
    assert len(files) >= 2 and len(commands) >= len(files)
    assert all(os.access(ROOT / command, os.X_OK) for command in commands)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what a source distribution holds, so that no earlier build gets in."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "CMakeLists.txt", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy / name)
    shutil.copytree(ROOT / "csrc", copy / "csrc")
    skipped = shutil.ignore_patterns("__pycache__", "lib")
    shutil.copytree(ROOT / "commhooks", copy / "commhooks", ignore=skipped)
    return copy


def build_wheel(checkout: Path, environment: dict[str, str], *options: str) -> tuple[zipfile.ZipFile, str]:
    target = checkout.parent / "wheel"
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-v",
        "--no-deps",
        *options,
        "-w",
        str(target),
        str(checkout),
    ]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("COMMHOOKS_")}
    done = subprocess.run(
        command,
        env=clean | {"COMMHOOKS_CUDA": "OFF"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    (wheel,) = target.glob("*.whl")
    return zipfile.ZipFile(wheel), done.stdout


@pytest.mark.parametrize("asked", [False, True])
def test_warnings_are_errors_only_where_asked(tmp_path: Path, asked: bool) -> None:
    """A newer compiler's new warning must not cost a user the library; ours are seen by CI."""
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("no cmake or no C++ compiler")
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"]
    command += ["-DCOMMHOOKS_WERROR=ON"] if asked else []
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    compiled = json.loads((tmp_path / "compile_commands.json").read_text())
    assert ".cpp" in {Path(entry["file"]).suffix for entry in compiled}  # and .cu where there is a compiler
    for entry in compiled:
        assert ("-Werror" in entry["command"]) == asked, entry["command"]


@pytest.mark.slow
@pytest.mark.native
def test_wheel_builds_in_isolation(checkout: Path, tmp_path: Path) -> None:
    wheel, output = build_wheel(checkout, {})
    assert "Installing build dependencies" in output and "WARNING: no C++" not in output
    assert Path(wheel.filename or "").name.startswith("commhooks-0.1.0-py3-none-")
    names = wheel.namelist()
    for needed in ("native/lib/libcommhooks_cpu.so", "native/ops.py", "transports/base.py", "py.typed"):
        assert f"commhooks/{needed}" in names, needed
    assert not [name for name in names if name.startswith(("tests", "csrc", "scripts"))]
    wheel.extractall(tmp_path / "installed")
    code = (
        "import torch, commhooks.native.abi as abi; from commhooks.native import ops;"
        "assert abi.__file__.startswith(%r), abi.__file__; assert abi.cpu() is not None;"
        "print(ops.random_indices(1, 2, 3, 1000, 5).tolist())"
    ) % str(tmp_path / "installed")
    run = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    environment.pop("COMMHOOKS_LIBRARY_DIR", None)
    done = subprocess.run(run, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[410, 469, 699, 872, 915]", done.stderr


def test_the_source_distribution_holds_what_a_build_needs(checkout: Path, tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    (checkout / "tests").mkdir()
    (checkout / "tests" / "test_a.py").touch()
    library = (
        checkout / "commhooks" / "native" / "lib" / "libcommhooks_cpu.so"
    )  # as a build in place leaves it
    library.parent.mkdir()
    library.touch()
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(tmp_path / "made")]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (made,) = (tmp_path / "made").iterdir()
    assert made.name == f"commhooks-{commhooks.__version__}.tar.gz"
    with tarfile.open(made) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        listed = archive.extractfile(f"commhooks-{commhooks.__version__}/PKG-INFO")
        assert listed is not None
        metadata = listed.read().decode()
    built_from = {str(file.relative_to(ROOT)) for file in (ROOT / "csrc").rglob("*") if file.is_file()}
    built_from |= {str(file.relative_to(ROOT)) for file in (ROOT / "commhooks").rglob("*.py")}
    built_from |= {
        "CMakeLists.txt",
        "setup.py",
        "pyproject.toml",
        "LICENSE",
        "README.md",
        "commhooks/py.typed",
    }
    assert built_from <= names, built_from - names
    assert not [name for name in names if name.endswith(".so") or name.startswith("tests")]
    assert "License-Expression: BSD-3-Clause" in metadata and "Requires-Python: >=3.10" in metadata


WITH_NVCC = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


@pytest.mark.slow
@pytest.mark.skipif(
    not (ROOT / "build/wheel/tools/stamp").exists(), reason="scripts/wheel has never run here"
)
@pytest.mark.timeout(900)
@pytest.mark.parametrize("options", [(), pytest.param(("--cuda",), marks=WITH_NVCC)])
def test_the_wheel_runs_on_old_systems(tmp_path: Path, options: tuple[str, ...]) -> None:
    """scripts/wheel, once it has its tools, builds a wheel that auditwheel accepts; nothing newer than glibc 2.28."""
    done = subprocess.run(
        [ROOT / "scripts" / "wheel", "--no-test", *options, tmp_path],
        capture_output=True,
        text=True,
        timeout=880,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    local = r"\+cu\d+" if options else ""
    version = re.escape(commhooks.__version__)
    assert re.match(rf"commhooks-{version}{local}-py3-none-manylinux_2_28_", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".so"))
        libraries = [archive.read(name) for name in names]
    assert [Path(name).stem for name in names] == [
        "libcommhooks_cpu",
        *(["libcommhooks_cuda"] if options else []),
    ]
    for library in libraries:
        needed = [tuple(map(int, found.split(b"."))) for found in re.findall(rb"GLIBC_(\d+\.\d+)", library)]
        assert needed and max(needed) <= (2, 28)


def test_a_wheel_for_cuda_needs_its_compiler(tmp_path: Path) -> None:
    for tool in ("bash", "dirname", "mkdir", "sed", "uname"):
        found = shutil.which(tool)
        assert found is not None
        (tmp_path / tool).symlink_to(found)
    done = subprocess.run(
        [ROOT / "scripts" / "wheel", "--cuda", tmp_path / "out"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1 and "--cuda needs nvcc, and there is none" in done.stderr


def test_wheel_says_what_it_does() -> None:
    done = subprocess.run([ROOT / "scripts" / "wheel", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "manylinux_2_28" in done.stdout and not done.stderr
    done = subprocess.run(
        [ROOT / "scripts" / "wheel", "--nosuch"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and "--nosuch" in done.stderr


NO_KERNELS = "WITHOUT the native kernels"


def build_without_kernels(checkout: Path, tmp_path: Path) -> list[str]:
    """The command by which pip has the libraries built, told to leave them out."""
    pytest.importorskip("setuptools", minversion="77")
    return [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path / "lib")]


def test_warning_reaches_the_terminal_that_pip_hides(checkout: Path, tmp_path: Path) -> None:
    """pip keeps a build's stderr to itself without -v: the warning also goes to the controlling terminal."""
    command = build_without_kernels(checkout, tmp_path)
    said = tmp_path / "stderr"
    child, terminal = pty.fork()  # the child leads a session whose controlling terminal is the pty
    if child == 0:
        try:
            with said.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            os.chdir(checkout)
            os.execve(command[0], command, {**os.environ, "COMMHOOKS_BUILD_NATIVE": "0"})
        finally:
            os._exit(127)
    shown = b""
    with contextlib.suppress(OSError):  # a pty says so when the other end is closed
        while part := os.read(terminal, 4096):
            shown += part
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, said.read_text()
    assert "commhooks: WARNING: COMMHOOKS_BUILD_NATIVE=0" in shown.decode() and NO_KERNELS in shown.decode()
    assert NO_KERNELS in said.read_text()


def test_warning_without_a_terminal(checkout: Path, tmp_path: Path) -> None:
    """In a session of its own there is no terminal: stderr has it, and the build goes on."""
    done = subprocess.run(
        build_without_kernels(checkout, tmp_path), cwd=checkout, text=True, timeout=120, start_new_session=True,
        env={**os.environ, "COMMHOOKS_BUILD_NATIVE": "0"}, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(NO_KERNELS) == 1


@pytest.mark.parametrize("name", ["COMMHOOKS_BUILD_NATIVE", "COMMHOOKS_CUDA"])
def test_a_variable_of_the_build_has_one_of_its_values(checkout: Path, tmp_path: Path, name: str) -> None:
    done = subprocess.run(
        build_without_kernels(checkout, tmp_path), cwd=checkout, text=True, timeout=120,
        env={**os.environ, name: "maybe"}, capture_output=True,
    )  # fmt: skip
    assert done.returncode != 0 and f"{name} must be" in done.stderr and "'maybe'" in done.stderr.lower()


@pytest.mark.slow
def test_wheel_without_a_compiler(checkout: Path) -> None:
    """What an empty PATH leaves: the Python package, and a warning that says so."""
    pytest.importorskip("setuptools", minversion="77")
    wheel, output = build_wheel(checkout, {"PATH": "/nonexistent"}, "--no-build-isolation")
    assert "WARNING" in output and NO_KERNELS in output  # pip -v: without it only a terminal shows it
    names = wheel.namelist()
    assert "commhooks/native/reference.py" in names
    assert not [name for name in names if name.endswith(".so")]
