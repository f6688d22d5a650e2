"""Common ground of the tests: what a machine must have, and what happens where it has not.

Markers: `mpi`, `native`, `horovod`, `network`, `cuda`. A marked test is skipped, with the reason, where the thing is missing. With
`COMMHOOKS_REQUIRE=mpi,native,horovod,network` in the environment (as in CI) it fails instead, and so does a run in which a
required marker had no test that passed. Everything under tests/horovod bears its marker.
"""

from __future__ import annotations

import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any, Generator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks are forked: the parent must have no thread pool
TESTS = Path(__file__).resolve().parent

import torch  # noqa: E402

torch.set_num_threads(1)

MARKERS = {
    "mpi": "needs mpi4py and an mpiexec beside the interpreter",
    "native": "needs the compiled library libcommhooks_cpu.so",
    "horovod": "needs Horovod built for this torch",
    "network": "makes network namespaces with limits: needs root, ip and tc",
    "cuda": "needs a CUDA device",
    "nvcc": "needs nvcc and nvdisasm (the wheel nvidia-cuda-nvdisasm has it)",
    "slow": "takes more than 20 s on two cores",
}
FOLDER_MARKERS = ("horovod",)
_passed: set[str] = set()


def required() -> set[str]:
    """The markers named in COMMHOOKS_REQUIRE; their tests fail where they would be skipped."""
    names = {name.strip() for name in os.environ.get("COMMHOOKS_REQUIRE", "").split(",") if name.strip()}
    unknown = names - set(MARKERS)
    if unknown:
        raise pytest.UsageError(f"COMMHOOKS_REQUIRE names unknown markers {sorted(unknown)}")
    return names


@lru_cache(maxsize=None)
def why_not(marker: str) -> str | None:
    """None if this machine can run tests with this marker, otherwise the reason."""
    if marker == "mpi":
        from launch import why_no_mpi

        return why_no_mpi()
    if marker == "horovod":
        from launch import why_no_horovod

        return why_no_horovod()
    if marker == "network":
        from benchmarks.harness.namespaces import why_not as why_no_network

        return why_no_network()
    if marker == "cuda":
        return None if torch.cuda.is_available() else "no CUDA device"
    if marker == "nvcc":
        from cuda_tools import why_no_nvcc

        return why_no_nvcc()
    if marker == "native":
        return _why_no_native()
    return None


def _why_no_native() -> str | None:
    from commhooks.native import abi

    return (
        None
        if abi.cpu() is not None
        else "the compiled library libcommhooks_cpu.so is not there or turned off"
    )


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--stress", action="store_true", help="repeat tests of races 200 times instead of 5")


@pytest.fixture
def repeats(request: pytest.FixtureRequest) -> int:
    """How often a test of a race runs it."""
    return 200 if request.config.getoption("--stress") else 5


def pytest_configure(config: pytest.Config) -> None:
    for name, text in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {text}")
    required()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        inside = Path(str(item.path)).relative_to(TESTS).parts if TESTS in item.path.parents else ()
        for name in FOLDER_MARKERS:
            if inside and inside[0] == name:
                item.add_marker(name)
        if item.config.getoption("--stress") and "repeats" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(7200))


def pytest_runtest_setup(item: pytest.Item) -> None:
    for name in MARKERS:
        if item.get_closest_marker(name) is None:
            continue
        reason = why_not(name)
        if reason is None:
            continue
        if name in required():
            pytest.fail(f"required by COMMHOOKS_REQUIRE: {reason}", pytrace=False)
        pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    report = yield
    names = {name for name in MARKERS if item.get_closest_marker(name) is not None}
    report.markers = sorted(names)  # goes to the process that counts: tests run in several (pytest-xdist)
    wanted = names & required()
    if report.skipped and wanted and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped although COMMHOOKS_REQUIRE names {sorted(wanted)}: {report.longrepr}"
    if report.when == "call" and report.passed and "mpi4py.MPI" in sys.modules:
        report.outcome = "failed"
        report.longrepr = (
            "this test started MPI in the test process: ranks forked by later tests would share it"
        )
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    report = yield
    if report.skipped and any(name in collector.path.parts for name in required()):
        report.outcome = "failed"
        report.longrepr = f"a whole file skipped although COMMHOOKS_REQUIRE asks for it: {report.longrepr}"
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed:
        _passed.update(report.markers)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if hasattr(session.config, "workerinput"):
        return  # a worker of pytest-xdist has seen its own tests only
    missing = required() - _passed
    if missing and exitstatus == 0 and not session.config.option.collectonly:
        print(f"\nno test passed for {sorted(missing)}, which COMMHOOKS_REQUIRE names")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
