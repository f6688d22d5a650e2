"""scripts/gpu_check without a GPU: its clock, its file, and what it calls, with stand-ins for the commands."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest
from gpu import checks
from gpu import report as reports
from gpu.report import Report, Skipped, TimedOut

ROOT = Path(__file__).resolve().parents[2]


def gpu_check() -> ModuleType:
    loader = SourceFileLoader("gpu_check", str(ROOT / "scripts" / "gpu_check"))
    spec = importlib.util.spec_from_loader("gpu_check", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def sleep(report: Report, seconds: float, limit_s: float = 60.0) -> str:
    return report.run(["sleep", str(seconds)], limit_s, ROOT, {})


def verdicts(file: Path) -> dict[str, str]:
    return {check["name"]: check["verdict"] for check in json.loads(file.read_text())["checks"]}


def test_the_budget_is_kept_and_time_has_its_own_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reports, "_TO_END_S", 3.0)
    begin = time.monotonic()
    report = Report(tmp_path / "out" / "r.json", {"device": "none"}, ["a", "b", "c", "d"], budget_s=5)
    assert verdicts(report.output) == dict.fromkeys("abcd", "not run") and report.exit_status() == 2
    assert report.check("a", lambda: sleep(report, 0.2))
    assert not report.check("b", lambda: sleep(report, 60, limit_s=0.3))
    assert not report.check("c", lambda: sleep(report, 60))  # as long as there is
    assert not report.check("d", lambda: sleep(report, 0))
    assert time.monotonic() - begin < 5
    assert verdicts(report.output) == {"a": "pass", "b": "timed out", "c": "timed out", "d": "timed out"}
    details = {check["name"]: check["detail"] for check in report.checks}
    assert "not done after 0 s" in details["b"] and "nothing was left of 5 s" in details["d"]
    assert report.exit_status() == 2 and json.loads(report.output.read_text())["passed"] is False


def test_file_after_every_check(tmp_path: Path) -> None:
    report = Report(tmp_path / "r.json", {"device": "none"}, ["a", "b", "c", "d"], budget_s=60)
    report.summarise = lambda: {"figures": [1]}
    report.check("a", lambda: "fine")
    assert json.loads(report.output.read_text())["figures"] == [1]

    def fails() -> str:
        assert verdicts(report.output)["a"] == "pass"
        return report.run([sys.executable, "-c", "print('so it is'); raise SystemExit(7)"], 60, ROOT, {})

    def skips() -> str:
        raise Skipped("no tool")

    def stops() -> str:
        raise KeyboardInterrupt

    report.check("b", skips)
    assert report.exit_status() == 2
    report.check("c", fails)
    with pytest.raises(KeyboardInterrupt):
        report.check("d", stops)
    written = json.loads(report.output.read_text())
    assert verdicts(report.output) == {"a": "pass", "b": "skip", "c": "fail", "d": "stopped"}
    assert "exit status 7: so it is" in written["checks"][2]["detail"]
    assert report.exit_status() == 1 and os.listdir(tmp_path) == ["r.json"]


def test_a_command_is_ended_with_all_it_started(tmp_path: Path) -> None:
    """A sanitizer's target, say, which would go on using the GPU."""
    report = Report(tmp_path / "r.json", {}, [], budget_s=60)
    pid_file = tmp_path / "pid"
    with pytest.raises(TimedOut):
        report.run(["sh", "-c", f"sleep 50 & echo $! >{pid_file}; wait"], 0.5, ROOT, {})
    assert gone(int(pid_file.read_text()))


def test_stopped_from_outside(tmp_path: Path) -> None:
    """SIGTERM, as `timeout` sends it: the command ends, the file says what was done and what was not."""
    program = tmp_path / "program.py"
    program.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT / 'scripts')!r})\n"
        "from pathlib import Path\n"
        "from gpu.report import Report, stop_on_signals\n"
        "stop_on_signals()\n"
        f"here = Path({str(tmp_path)!r})\n"
        "report = Report(here / 'r.json', {}, ['a', 'b', 'c'], budget_s=60)\n"
        "report.check('a', lambda: 'fine')\n"
        "report.check('b', lambda: report.run(['sh', '-c', 'echo $$ >pid; exec sleep 50'], 50, here, {}))\n"
    )
    process = subprocess.Popen([sys.executable, str(program)], stdout=subprocess.DEVNULL)
    pid_file = tmp_path / "pid"
    deadline = time.monotonic() + 20
    while not (pid_file.exists() and pid_file.read_text().strip()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 128 + signal.SIGTERM
    assert verdicts(tmp_path / "r.json") == {"a": "pass", "b": "stopped", "c": "not run"}
    assert gone(int(pid_file.read_text()))


def gone(pid: int) -> bool:
    """Whether a process has ended, within seconds (a zombie has)."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_figures_come_before_what_is_slow(tmp_path: Path) -> None:
    module = gpu_check()
    names = list(module.all_checks(False, (9, 0)))
    assert names[:4] == ["build", "native tests", "DDP over NCCL", "benchmark"] and "memcheck" in names[4:]
    report = Report(tmp_path / "r.json", {}, names, budget_s=60)
    called: list[str] = []

    def failing(report: Report) -> str:
        called.append("one")
        raise RuntimeError("no compiler")

    module.run_all(report, {names[0]: failing, names[1]: lambda report: called.append("two") or ""})
    assert called == ["one"] and report.exit_status() == 1
    module.run_all(report, {names[0]: lambda report: "", names[1]: failing, names[2]: lambda report: "three"})
    assert verdicts(report.output)[names[2]] == "pass"  # what fails later does not keep the rest from running


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose programs are the only ones that gpu_check finds."""
    folder = tmp_path / "tools"
    folder.mkdir()

    def tool(name: str) -> str | None:
        return str(folder / name) if (folder / name).exists() else None

    monkeypatch.setattr(checks, "tool", tool)
    monkeypatch.setattr(checks, "BUILD", tmp_path / "build")
    monkeypatch.setattr(checks, "LIBRARY", tmp_path / "build" / "libcommhooks_cuda.so")
    return folder


def program(folder: Path, name: str, text: str) -> None:
    """A shell program that also writes down its arguments."""
    path = folder / name
    path.write_text(f'#!/bin/sh\necho "{name} $*" >>{folder}/calls\n{text}\n')
    path.chmod(0o755)


def calls(folder: Path) -> list[str]:
    found = (folder / "calls").read_text().splitlines()
    (folder / "calls").unlink()
    return found


def test_build_with_what_is_there(stand_ins: Path, tmp_path: Path) -> None:
    report = Report(tmp_path / "r.json", {}, [], budget_s=60)
    with pytest.raises(RuntimeError, match="no nvcc"):
        checks.build(report, (9, 0))
    program(stand_ins, "nvcc", "")
    built = tmp_path / "build" / "cmake-{}" / "libcommhooks_cuda.so"
    cmake = f'case "$1" in --build) touch "$2/libcommhooks_cuda.so";; *) mkdir -p "{tmp_path}/build/$(basename "$4")";; esac'
    assert checks.build(report, (9, 0)).startswith("nvcc, sm_90")
    (said,) = calls(stand_ins)
    assert "-arch=sm_90" in said and "pass.cu" in said and "device.cu" in said
    program(stand_ins, "cmake", cmake)
    assert "neither Ninja nor make" in checks.build(report, (9, 0))
    assert len(calls(stand_ins)) == 1
    program(stand_ins, "make", "")
    assert (
        checks.build(report, (9, 0)) == "CMake with make, sm_90" and Path(str(built).format("make")).exists()
    )
    assert "-G Unix Makefiles" in calls(stand_ins)[0]
    program(stand_ins, "ninja", "")
    assert checks.build(report, (12, 0)) == "CMake with ninja, sm_120" and checks.LIBRARY.exists()
    configured, _ = calls(stand_ins)
    assert f"-G Ninja -DCMAKE_MAKE_PROGRAM={stand_ins}/ninja" in configured
    assert f"-DCMAKE_CUDA_COMPILER={stand_ins}/nvcc" in configured and "WERROR" not in configured
    program(stand_ins, "cmake", "echo too old; exit 1")
    assert "CMake could not configure: exit status 1: too old" in checks.build(report, (9, 0))


@pytest.mark.parametrize("option", ["--kernel-name", "--kernel-regex", ""])
def test_sanitizers_look_at_our_kernels_only(stand_ins: Path, tmp_path: Path, option: str) -> None:
    report = Report(tmp_path / "r.json", {}, [], budget_s=60)
    with pytest.raises(Skipped):
        checks.sanitize(report, "memcheck", "small", 30)
    sees = 'case "$*" in *" fault "*) echo "ERROR SUMMARY: 3 errors"; exit 1;; *) echo "ERROR SUMMARY: 0 errors";; esac'
    program(
        stand_ins, "compute-sanitizer", f'[ "$1" = --help ] && {{ echo "  {option} arg"; exit; }}\n{sees}'
    )
    assert "0 errors" in checks.sanitize(report, "memcheck", "small", 30)
    _, small, fault = calls(stand_ins)
    assert (f"{option} kns=commhooks" in small) == bool(option) == ("kns=" in fault)
    assert small.endswith("cuda_runs.py small --device cuda") and fault.endswith(
        "cuda_runs.py fault --device cuda"
    )
    checks.sanitize(report, "racecheck", "few", 30)
    assert len(calls(stand_ins)) == 2
    program(stand_ins, "compute-sanitizer", 'echo "ERROR SUMMARY: 0 errors"')
    with pytest.raises(RuntimeError, match="did not see a read out of bounds"):
        checks.sanitize(report, "memcheck", "small", 30)
    program(stand_ins, "compute-sanitizer", 'echo "ERROR SUMMARY: 2 errors"; exit 9')
    with pytest.raises(RuntimeError, match="exit status 9"):
        checks.sanitize(report, "racecheck", "few", 30)


def test_figures_of_a_benchmark_that_was_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "FIGURES", tmp_path / "kernels.jsonl")
    monkeypatch.setattr(checks, "build_rival", lambda report, capability: ([], "without CUB"))
    report = Report(tmp_path / "r.json", {}, ["benchmark"], budget_s=60)
    report.summarise = lambda: {"figures": checks.figures()}

    def cut_short(*arguments: object, **environment: str) -> str:
        checks.FIGURES.write_text(json.dumps({"kernel": "select_topk"}) + "\n")
        raise TimedOut("not done")

    monkeypatch.setattr(checks, "run", cut_short)
    report.check("benchmark", lambda: checks.benchmark(report, False, (9, 0)))
    assert verdicts(report.output) == {"benchmark": "timed out"}
    assert json.loads(report.output.read_text())["figures"] == [{"kernel": "select_topk"}]
