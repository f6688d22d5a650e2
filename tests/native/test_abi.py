"""Which library is used, and what says so: COMMHOOKS_NATIVE, the ABI version, ``python -m commhooks info``."""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from commhooks import cli
from commhooks.native import abi, cpu, ops, reference

ROOT = Path(__file__).resolve().parents[2]


def info(**environment: str) -> dict[str, str]:
    """The lines of ``python -m commhooks info`` by name."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("COMMHOOKS_")}
    done = subprocess.run(
        [sys.executable, "-m", "commhooks", "info"],
        env=clean | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    pairs = (line.partition("  ") for line in done.stdout.splitlines())
    return {name.strip(): text.strip() for name, _, text in pairs}


@pytest.mark.native
@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads the flags of an x86-64 /proc/cpuinfo")
def test_the_best_instruction_set_of_the_processor_is_taken() -> None:
    """The kernel's list of what it lets programs use is the oracle, whatever compiler built the library."""
    found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    assert found
    flags = set(found[1].split())
    expected = "scalar"
    if {"avx2", "f16c", "popcnt", "bmi1", "bmi2"} <= flags:
        expected = "avx2"
        if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
            expected = "avx512"
    assert info()["cpu kernels"] == f"native ({expected})"


@pytest.mark.native
def test_info_names_the_library() -> None:
    lines = info()
    assert lines["cpu kernels"].startswith("native (")
    assert Path(lines["cpu library"]) == abi.path("cpu")
    assert lines["torch"] == torch.__version__


@pytest.mark.native
def test_info_names_the_instruction_set_that_was_asked_for() -> None:
    assert info(COMMHOOKS_ISA="scalar")["cpu kernels"] == "native (scalar)"


@pytest.mark.parametrize("off", ["0", "off", "No"])
def test_info_says_that_native_code_is_turned_off(off: str) -> None:
    lines = info(COMMHOOKS_NATIVE=off)
    for device in ("cpu", "cuda"):
        assert lines[f"{device} kernels"] == "torch operators (COMMHOOKS_NATIVE=0)"
        assert lines[f"{device} library"] == "not in use"


def test_info_says_that_there_is_no_library(tmp_path: Path) -> None:
    lines = info(COMMHOOKS_LIBRARY_DIR=str(tmp_path))
    assert lines["cpu kernels"].startswith("torch operators (no usable library: ")
    assert lines["cpu kernels"].endswith("libcommhooks_cpu.so was not built)")


@pytest.mark.native
def test_a_checkout_takes_the_libraries_of_the_installed_package(tmp_path: Path) -> None:
    """After `pip install .` the working folder shadows the installed package, and has no library itself."""
    checkout, installed = tmp_path / "checkout", tmp_path / "site-packages"
    without = shutil.ignore_patterns("lib", "__pycache__")
    shutil.copytree(ROOT / "commhooks", checkout / "commhooks", ignore=without)
    shutil.copytree(ROOT / "commhooks", installed / "commhooks", ignore=without)
    (installed / "commhooks/native/lib").mkdir()
    library = Path(shutil.copy(abi.path("cpu"), installed / "commhooks/native/lib"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COMMHOOKS_")}
    environment["PYTHONPATH"] = str(installed)
    command = [sys.executable, "-m", "commhooks", "info", "--json"]
    done = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True, timeout=120)
    lines = json.loads(done.stdout)
    assert lines["commhooks"].endswith(str(checkout / "commhooks"))
    assert lines["cpu kernels"].startswith("native (") and lines["cpu library"] == str(library)


@pytest.mark.parametrize(
    "name, value",
    [("COMMHOOKS_NATIVE", "of"), ("COMMHOOKS_LIBRARY_DIR", "/nowhere/at/all"), ("COMMHOOKS_ISA", "avx1024")],
)
def test_a_value_that_means_nothing_is_an_error(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "COMMHOOKS_ISA" and abi.cpu() is None:
        pytest.skip("needs the library")
    monkeypatch.setenv(name, value)
    abi.cpu.cache_clear()
    with pytest.raises(ValueError, match=f"{name} must be .*{value!r}"):
        abi.cpu()
    assert cli.main(["info"]) == 2
    assert f"commhooks info: {name} must be" in capsys.readouterr().err
    monkeypatch.undo()
    assert "native (" in abi.describe()["cpu kernels"] or abi.cpu() is None


def test_info_in_this_process(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed and text in printed for name, text in abi.describe().items())


@pytest.mark.native
def test_native_0_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library is there and is not loaded; ``ops`` goes to the torch operators."""
    assert abi.path("cpu").is_file()
    monkeypatch.setenv("COMMHOOKS_NATIVE", "0")
    unused = abi.cpu.__wrapped__()
    assert unused is None
    monkeypatch.setattr(abi, "cpu", lambda: unused)
    assert ops._implementation(torch.device("cpu")) is reference
    monkeypatch.undo()
    assert ops._implementation(torch.device("cpu")) is cpu


def test_a_library_of_somebody_else_is_not_used(tmp_path, caplog, monkeypatch):
    """It was an AttributeError at the first kernel."""
    import _ctypes

    file = tmp_path / abi.path("cpu").name
    file.write_bytes(Path(_ctypes.__file__).read_bytes())
    monkeypatch.setenv("COMMHOOKS_LIBRARY_DIR", str(tmp_path))
    assert abi._load("cpu") is None
    assert f"{file} is no library of commhooks" in caplog.text


@pytest.mark.native
def test_another_abi_version_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its functions may take other arguments: it is said and the torch operators take over."""
    assert abi.cpu.__wrapped__() is not None
    monkeypatch.setattr(abi, "ABI_VERSION", abi.ABI_VERSION + 1)
    with caplog.at_level(logging.WARNING):
        assert abi.cpu.__wrapped__() is None
    assert f"ABI version {abi.ABI_VERSION - 1}, expected {abi.ABI_VERSION}: not used" in caplog.text


def test_what_is_no_library_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("COMMHOOKS_LIBRARY_DIR", str(tmp_path))
    monkeypatch.setenv("COMMHOOKS_NATIVE", "1")
    abi.path("cpu").write_text("not a library")
    with caplog.at_level(logging.WARNING):
        assert abi.cpu.__wrapped__() is None
    assert "could not be loaded" in caplog.text


def test_describe_names_the_implementation() -> None:
    text = abi.describe()
    assert text["cpu kernels"].startswith("native (" if abi.cpu() is not None else "torch operators")
