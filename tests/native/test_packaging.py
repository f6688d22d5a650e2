"""The wheel: built in isolation without torch, for every Python and torch, and without a compiler."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


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
        "import torch, commhooks.native.library as library; from commhooks.native import ops;"
        "assert library.__file__.startswith(%r), library.__file__; assert library.cpu() is not None;"
        "print(ops.random_indices(1, 2, 3, 1000, 5).tolist())"
    ) % str(tmp_path / "installed")
    run = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    environment.pop("COMMHOOKS_LIBRARY_DIR", None)
    done = subprocess.run(run, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[410, 469, 699, 872, 915]", done.stderr


@pytest.mark.slow
def test_wheel_without_a_compiler(checkout: Path) -> None:
    """What an empty PATH leaves: the Python package, and a warning that says so."""
    pytest.importorskip("setuptools", minversion="77")
    wheel, output = build_wheel(checkout, {"PATH": "/nonexistent"}, "--no-build-isolation")
    assert "WARNING" in output and "WITHOUT the native kernels" in output
    names = wheel.namelist()
    assert "commhooks/native/reference.py" in names
    assert not [name for name in names if name.endswith(".so")]
