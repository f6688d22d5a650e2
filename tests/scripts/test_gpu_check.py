"""scripts/gpu_check without a GPU: its clock, its files and texts, what it calls, and the whole dry run."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from benchmarks.harness import pages
from benchmarks.kernels import cuda as kernels_cuda
from gpu import build, checks, machine, page
from gpu import runner as runners
from gpu.programs import models, split
from gpu.runner import Check, Job, Runner, Skipped, last_step
from gpu.targets import CLEAN, SANITIZERS, targets

ROOT = Path(__file__).resolve().parents[2]


def gpu_check() -> ModuleType:
    loader = SourceFileLoader("gpu_check", str(ROOT / "scripts" / "gpu_check"))
    spec = importlib.util.spec_from_loader("gpu_check", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def run(folder: Path, *table: Check, **options: Any) -> Runner:
    """A runner over made-up checks, all run."""
    options = {"budget_s": 60.0, **options}
    runner = Runner(folder / "out", folder / "work", {"device": "none"}, table, **options)
    runner.run_all()
    return runner


def job_of(folder: Path, **options: Any) -> Job:
    """A check's job, for functions that take one."""
    check = Check("a check", lambda job: "", 60)
    runner = Runner(
        folder / "out", folder / "work", {"compute_capability": "9.0"}, [check], budget_s=60, **options
    )
    return Job(runner, check)


def verdicts(folder: Path) -> dict[str, str]:
    written = json.loads((folder / "out" / "gpu.json").read_text())
    return {check["name"]: check["verdict"] for check in written["checks"]}


def detail(runner: Runner, name: str) -> str:
    (entry,) = (entry for entry in runner.entries if entry["name"] == name)
    return str(entry["detail"])


def sleeps(seconds: float) -> Any:
    return lambda job: job.run(["sleep", str(seconds)])


def python(text: str) -> Any:
    return lambda job: job.run([sys.executable, "-c", text], PYTHONFAULTHANDLER="1", PYTHONUNBUFFERED="1")


# ---- the clock and the files


def test_the_budget_is_kept_and_time_has_its_own_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runners, "_TO_END_S", 3.0)
    begin = time.monotonic()
    table = [
        Check("a", sleeps(0.1), 60),
        Check("b", sleeps(60), 0.3),
        Check("c", sleeps(60), 60),
        Check("d", sleeps(0), 60),
    ]
    runner = run(tmp_path, *table, budget_s=5)
    assert time.monotonic() - begin < 6
    assert verdicts(tmp_path) == {"a": "pass", "b": "timed out", "c": "timed out", "d": "timed out"}
    assert "not done after 0 s" in detail(runner, "b") and "nothing was left of 5 s" in detail(runner, "d")
    assert runner.exit_status() == 2
    assert json.loads((tmp_path / "out" / "gpu.json").read_text())["passed"] is False


def test_files_after_every_check(tmp_path: Path) -> None:
    def fails(job: Job) -> str:
        assert verdicts(tmp_path) == {"a": "pass", "b": "skip", "c": "not run", "d": "not run"}
        return job.run([sys.executable, "-c", "print('so it is'); raise SystemExit(7)"])

    def skips(job: Job) -> str:
        raise Skipped("no tool")

    def measures(job: Job) -> str:
        job.result("figures.json").write_text("[1]")
        return "fine"

    table = [
        Check("a", measures, 60),
        Check("b", skips, 60),
        Check("c", fails, 60),
        Check("d", sleeps(0), 60),
    ]
    runner = run(tmp_path, *table, page=lambda everything: f"{len(everything['checks'])} checks")
    assert runner.exit_status() == 1 and "exit status 7: so it is" in detail(runner, "c")
    assert verdicts(tmp_path)["d"] == "pass"  # what fails later does not keep the rest from running
    assert sorted(os.listdir(tmp_path / "out")) == ["gpu.json", "logs.tar.gz", "report.md"]
    assert json.loads((tmp_path / "out" / "gpu.json").read_text())["results"] == {"figures": [1]}
    assert (tmp_path / "out" / "report.md").read_text() == "4 checks"
    with tarfile.open(tmp_path / "out" / "logs.tar.gz") as archive:
        log = archive.extractfile("logs/c.log")
        assert log is not None and re.search(
            rb"SystemExit\(7\).*\nso it is\n\[exit status 7", log.read(), re.DOTALL
        )
        assert "results/figures.json" in archive.getnames()


def test_a_fault_in_the_texts_does_not_end_the_run(tmp_path: Path) -> None:
    """Results of a program that was cut short may lack what a text asks for."""

    def fails(*given: Any) -> Any:
        raise KeyError("ms")

    runner = run(tmp_path, Check("a", sleeps(0), 60), Check("b", sleeps(0), 60), summarise=fails, page=fails)
    assert verdicts(tmp_path) == {"a": "pass", "b": "pass"} and runner.exit_status() == 0
    assert (tmp_path / "out" / "report.md").read_text().startswith("No page: KeyError: 'ms'")


def test_nothing_runs_without_the_first(tmp_path: Path) -> None:
    runner = run(
        tmp_path, Check("build", python("raise SystemExit('no compiler')"), 60), Check("b", sleeps(0), 60)
    )
    assert verdicts(tmp_path) == {"build": "fail", "b": "not run"} and runner.exit_status() == 1


@pytest.mark.parametrize(("dry", "meet"), [(False, "cd"), (True, "bc")])
def test_what_runs_side_by_side(tmp_path: Path, dry: bool, meet: str) -> None:
    """Neighbours of one group; in a dry run all but the first."""
    met, now, together = threading.Barrier(2), set[str](), set[str]()

    def watch(job: Job) -> str:
        now.add(job.check.name)
        if job.check.name in meet:
            met.wait(20)  # for the other one: broken unless both run at the same time
        elif len(now) > 1:
            together.add(job.check.name)
        now.discard(job.check.name)
        return ""

    table = [Check(name, watch, 60, beside) for name, beside in zip("abcd", ("", "", "tests", "tests"))]
    run(tmp_path, *table, dry=dry)
    assert set(verdicts(tmp_path).values()) == {"pass"} and not together & {"a", *("b" if not dry else "")}


def test_a_command_is_ended_with_all_it_started(tmp_path: Path) -> None:
    """A sanitizer's target, say, which would go on using the GPU."""
    pid_file = tmp_path / "pid"
    run(tmp_path, Check("a", lambda job: job.run(["sh", "-c", f"sleep 50 & echo $! >{pid_file}; wait"]), 0.5))
    assert verdicts(tmp_path) == {"a": "timed out"} and gone(int(pid_file.read_text()))


def hung(folder: Path, *command: str) -> str:
    """What is told of a command that hangs after it has made the file ``there``."""

    def call(job: Job) -> str:
        started = job.start([sys.executable, *command], PYTHONFAULTHANDLER="1", PYTHONUNBUFFERED="1")
        while not (folder / "there").exists() and job.left_s() > 0:
            time.sleep(0.05)
        return started.wait(0.1)

    runner = run(folder, Check("hangs", call, 55))
    assert verdicts(folder) == {"hangs": "timed out"}
    return detail(runner, "hangs")


STUCK = "import pathlib, time\ndef {name}():\n    pathlib.Path({there!r}).touch()\n    time.sleep(60)\n"


def test_a_hang_names_its_step_and_shows_where_it_stands(tmp_path: Path) -> None:
    text = STUCK.format(name="stuck", there=str(tmp_path / "there"))
    told = hung(tmp_path, "-c", f"{text}print('>>> gtopk, P = 4')\nstuck()")
    assert "in 'gtopk, P = 4'" in told and "line 4 in stuck" in told


def test_a_hang_names_its_test(tmp_path: Path) -> None:
    file = tmp_path / "test_hang.py"
    file.write_text(
        STUCK.format(name="test_stuck", there=str(tmp_path / "there")) + "def test_late(): pass\n"
    )
    told = hung(
        tmp_path,
        *"-m pytest -v -p no:cacheprovider -c".split(),
        os.devnull,
        f"--rootdir={tmp_path}",
        str(file),
    )
    assert "test_hang.py::test_stuck" in told.splitlines()[0] and "in test_stuck" in told


def test_the_last_step() -> None:
    assert last_step("") == ""
    assert last_step(">>> one\nnoise\n>>> two\nnoise") == "two"
    assert (
        last_step("tests/a.py::test_one PASSED [50%]\ntests/a.py::test_two[x] ") == "tests/a.py::test_two[x]"
    )
    assert last_step("tests/a.py::test_one PASSED [50%]\n") == "after tests/a.py::test_one"


def test_stopped_from_outside(tmp_path: Path) -> None:
    """SIGTERM, as `timeout` sends it: all commands end, the file says what was done and what was not."""
    program = tmp_path / "program.py"
    program.write_text(
        "from pathlib import Path\n"
        "from gpu.runner import Check, Runner, stop_on_signals\n"
        "stop_on_signals()\n"
        f"here = Path({str(tmp_path)!r})\n"
        "def waits(job):\n"
        "    return job.run(['sh', '-c', f'echo $$ >{here}/pid-{job.check.name}; exec sleep 50'])\n"
        "table = [Check('a', lambda job: 'fine', 60), Check('b', waits, 60, 'x'), Check('c', waits, 60, 'x'), "
        "Check('d', waits, 60)]\n"
        "Runner(here / 'out', here / 'work', {}, table, budget_s=60).run_all()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "scripts"), str(ROOT)])}
    process = subprocess.Popen([sys.executable, str(program)], stdout=subprocess.DEVNULL, env=environment)
    files = [tmp_path / "pid-b", tmp_path / "pid-c"]
    deadline = time.monotonic() + 20
    while (
        not all(file.exists() and file.read_text().strip() for file in files) and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 128 + signal.SIGTERM
    assert verdicts(tmp_path) == {"a": "pass", "b": "stopped", "c": "stopped", "d": "not run"}
    assert all(gone(int(file.read_text())) for file in files)


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


# ---- the table


def test_targets_come_first_and_within_their_time() -> None:
    names = [check.name for check in checks.CHECKS]
    before = names[: names.index("targets") + 1]
    assert before == ["build", "smoke", "NCCL to itself", "targets"]
    assert (
        names.index("kernel split")
        < names.index("ncu")
        < names.index("ResNet-50")
        < names.index("native tests")
    )
    assert names.index("native tests") < names.index("benchmark, the rest") < names.index("memcheck")
    timed = {"targets", "kernel split", "ncu", "ResNet-50", "GPT", "host cost", "benchmark, the rest"}
    assert all(
        (check.beside == "") == (check.name in timed | {"build", "smoke", "NCCL to itself"})
        for check in checks.CHECKS
    )
    assert len(set(names)) == len(names)


def test_only_and_skip() -> None:
    assert [check.name for check in checks.named(["ncu", "GPT"], [])] == ["build", "ncu", "GPT"]
    assert [check.name for check in checks.named(["ncu"], ["build"])] == ["ncu"]
    assert "memcheck" not in [check.name for check in checks.named([], ["memcheck"])]
    with pytest.raises(ValueError, match="no check is called 'nuc'; there are: build, smoke"):
        checks.named([], ["nuc"])


# ---- the build


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose programs are the only ones that gpu_check finds."""
    folder = tmp_path / "tools"
    folder.mkdir()

    def tool(name: str) -> str | None:
        return str(folder / name) if (folder / name).exists() else None

    monkeypatch.setattr(build, "tool", tool)
    monkeypatch.setattr(checks, "tool", tool)
    monkeypatch.setattr(build, "find_cub", lambda: None)
    return folder


def program(folder: Path, name: str, text: str = "") -> None:
    """A shell program that also writes down its arguments."""
    path = folder / name
    path.write_text(f'#!/bin/sh\necho "{name} $*" >>{folder}/calls\n{text}\n')
    path.chmod(0o755)


def calls(folder: Path) -> list[str]:
    found = sorted((folder / "calls").read_text().splitlines())
    (folder / "calls").unlink()
    return found


def test_build_with_what_is_there(stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of(tmp_path)
    with pytest.raises(RuntimeError, match="no nvcc"):
        build.build(job)
    program(stand_ins, "nvcc")
    program(stand_ins, "g++")
    assert "scalar kernels (no CMake" in build.build(job)
    compiler, nvcc = calls(stand_ins)
    assert (
        "-arch=sm_90" in nvcc
        and "pass.cu" in nvcc
        and "-fmad=false" in nvcc
        and "libcommhooks_cuda.so" in nvcc
    )
    assert "select_topk.cpp" in compiler and "-ffp-contract=off" in compiler and "avx" not in compiler
    program(
        stand_ins, "cmake", 'case "$1" in --build) touch "$2/libcommhooks_cpu.so";; *) mkdir -p "$4";; esac'
    )
    assert "scalar kernels" in build.build(job)  # neither make nor ninja
    calls(stand_ins)
    for generator, name in (("Unix Makefiles", "make"), ("Ninja", "ninja")):
        program(stand_ins, name)
        assert "CPU library: CMake; CUB's rival: no CUB headers" in build.build(job)
        configure = calls(stand_ins)[1]
        assert f"-G {generator} -DCMAKE_MAKE_PROGRAM={stand_ins}/{name}" in configure
    assert (build.libraries(job.runner) / "libcommhooks_cpu.so").is_file()
    program(stand_ins, "cmake", "echo too old; exit 1")
    assert "torch operators instead (exit status 1: too old" in build.build(job)
    program(stand_ins, "nvcc", "echo wrong; exit 2")
    with pytest.raises(RuntimeError, match="wrong"):
        build.build(job)
    job.runner.stop()


def test_the_flags_are_those_of_the_package() -> None:
    cuda = (ROOT / "csrc" / "cuda" / "CMakeLists.txt").read_text()
    assert "-fmad=false" in cuda and "-fmad=false" in build.CUDA_FLAGS
    assert "CUDA_STANDARD 17" in cuda and "-std=c++17" in build.CUDA_FLAGS
    assert "CUDA_RUNTIME_LIBRARY Static" in cuda and "-cudart=static" in build.CUDA_FLAGS


def test_the_rival_is_waited_for_where_it_is_needed(
    stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(tmp_path)
    assert build.rival(job) == ([], "without CUB: no header device_topk.cuh (nvidia-cuda-cccl >= 13.2.86)")
    monkeypatch.setattr(build, "find_cub", lambda: tmp_path)
    program(
        stand_ins, "nvcc", 'sleep 0.5; for last; do :; done; while [ "$1" != -o ]; do shift; done; touch "$2"'
    )
    program(stand_ins, "g++")
    command = build.rival_command(job.runner)
    assert (
        command is not None
        and f"-I{tmp_path}" in command
        and str(build.RIVAL) in command
        and build.RIVAL.is_file()
    )
    assert build.build(job).endswith("CUB's rival: started")
    arguments, about = build.rival(job)
    assert about == "with CUB" and Path(arguments[1]).is_file()
    assert build.rival(job) == (arguments, about)  # the second part of the benchmark finds it too
    program(stand_ins, "nvcc", 'case "$*" in *cub_rival*) echo a template error; exit 1;; esac')
    Path(arguments[1]).unlink()
    build.build(job)
    assert "which did not compile: exit status 1: a template error" in build.rival(job)[1]


# ---- what the checks call


@pytest.mark.parametrize("option", ["--kernel-name", "--kernel-regex", ""])
def test_sanitizers_look_at_our_kernels_only(stand_ins: Path, tmp_path: Path, option: str) -> None:
    job = job_of(tmp_path)
    with pytest.raises(Skipped):
        checks.sanitize(job, "memcheck", "small")
    sees = 'case "$*" in *" fault "*) echo "ERROR SUMMARY: 3 errors"; exit 1;; *) echo "ERROR SUMMARY: 0 errors";; esac'
    program(
        stand_ins, "compute-sanitizer", f'[ "$1" = --help ] && {{ echo "  {option} arg"; exit; }}\n{sees}'
    )
    assert "0 errors" in checks.sanitize(job, "memcheck", "small")
    _, fault, small = sorted(calls(stand_ins), key=lambda line: ("small" in line, "fault" in line))
    assert (f"{option} kns=commhooks" in small) == bool(option) == ("kns=" in fault)
    assert small.endswith("cuda_runs.py small --device cuda") and "cuda_runs.py fault --device cuda" in fault
    for kind in ("racecheck", "initcheck", "synccheck"):
        checks.sanitize(job, kind, "few")
        run = next(line for line in calls(stand_ins) if f"--tool {kind} --error-exitcode 9" in line)
        assert run.endswith("--raw-scratch") == (kind == "initcheck")  # poison would count as initialized
    program(stand_ins, "compute-sanitizer", 'echo "ERROR SUMMARY: 0 errors"')
    with pytest.raises(RuntimeError, match="did not see a read out of bounds"):
        checks.sanitize(job, "memcheck", "small")
    program(stand_ins, "compute-sanitizer", 'echo "ERROR SUMMARY: 2 errors"; exit 9')
    with pytest.raises(RuntimeError, match="exit status 9"):
        checks.sanitize(job, "racecheck", "few")


def commands(folder: Path, monkeypatch: pytest.MonkeyPatch, dry: bool) -> dict[str, list[str]]:
    """What each check would run, by its name, without the options that tell a dry run from a real one."""
    found: dict[str, list[str]] = {}

    def keep(self: Job, command: Any, **environment: str) -> str:
        words = [str(word) for word in command]
        for option, count in (("--dry-run", 1), ("--library", 2), ("--device", 2), ("--cub", 2)):
            if option in words:
                del words[words.index(option) : words.index(option) + count]
        found[self.check.name] = words
        return "3 passed"

    monkeypatch.setattr(Job, "run", keep)
    table = [check for check in checks.CHECKS if check.name not in ("build", "ncu", *SANITIZERS)]
    runner = Runner(folder / "out", folder / "work", {}, table, budget_s=60, dry=dry)
    build.emulated(runner).parent.mkdir(parents=True, exist_ok=True)
    build.emulated(runner).touch()
    for check in table:
        runner.run_check(check)
    assert not runner.named("fail")
    return found


def test_the_dry_run_runs_what_the_real_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dry, real = (commands(tmp_path, monkeypatch, dry) for dry in (True, False))
    assert real.pop("CuPy and array interface")[-1] == "tests/native/test_cuda.py"
    assert (dry["smoke"].pop(), real["smoke"].pop()) == ("few", "small")
    assert dry == real and len(real) == 14
    folder = ROOT / "scripts" / "gpu" / "programs"
    modules = {word for words in real.values() for word in words if word.startswith("gpu.programs.")}
    programs = {module.rpartition(".")[2] for module in modules}
    parts = {"__init__", "place", "models", "fake_horovod"}
    assert {file.stem for file in folder.glob("*.py")} == programs | parts  # no program is forgotten


NCU_PAGE = """==PROF== Connected to process 12
>>> 25M, 0.1 %
==PROF== Profiling "sample_kernel" - 0: 0%....50%....100% - 9 passes
>>> 100M, 0.1 %
2 cases, one call each
  commhooks::(anonymous namespace)::sample_kernel(Operands, Sample) (264, 1, 1)x(256, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    Duration                         us        12.10
  void commhooks::(anonymous namespace)::pass_kernel<(commhooks::Dtype)0, 0>(Operands, Target, bool) (528, 1, 1)x(256, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    Section: GPU Speed Of Light Throughput
    ----------------------- ----------- ------------
    Metric Name             Metric Unit Metric Value
    ----------------------- ----------- ------------
    SM Frequency                    Ghz         1.60
    Duration                         us       112.35
    DRAM Throughput                   %        88.10
    Compute (SM) Throughput           %        41.00
    ----------------------- ----------- ------------
    OPT   The workload is utilizing greater than 80.0% of the available memory performance.
  commhooks::(anonymous namespace)::sample_kernel(Operands, Sample) (264, 1, 1)x(256, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    Duration                         us        13.00
  commhooks::(anonymous namespace)::finish_kernel(Finish) (264, 1, 1)x(256, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    Duration                         us     1,034.50
"""


def test_ncu_is_asked_for_our_kernels_and_read(stand_ins: Path, tmp_path: Path) -> None:
    job = job_of(tmp_path)
    with pytest.raises(Skipped, match="no ncu"):
        checks.ncu(job)
    (stand_ins / "page").write_text(NCU_PAGE)
    program(stand_ins, "ncu", f"cat {stand_ins}/page")
    assert checks.ncu(job) == "4 kernels"
    (said,) = calls(stand_ins)
    assert (
        "--profile-from-start off" in said and "pass_kernel" in said and "gpu.programs.split --once" in said
    )
    assert json.loads(job.result("ncu.json").read_text()) == {
        "25M, 0.1 %": {
            "sample": {"Duration, us": 12.1},
            "pass": {"Duration, us": 112.35, "DRAM Throughput": 88.1, "Compute (SM) Throughput": 41.0},
        },
        "100M, 0.1 %": {"sample": {"Duration, us": 13.0}, "finish": {"Duration, us": 1034.5}},
    }
    program(stand_ins, "ncu", "echo no permission")
    with pytest.raises(RuntimeError, match="said nothing"):
        checks.ncu(job)


def test_the_profilers_rows_by_part() -> None:
    class Row:
        def __init__(self, key: str, us: float) -> None:
            self.key, self.self_device_time_total = key, us

    names = (
        "Memset (Device)",
        "void commhooks::pass_kernel<0, false>(...)",
        "commhooks::sample_kernel(Sample)",
        "elementwise",
    )
    rows = [Row(name, us) for name, us in zip(names, (40.0, 2000.0, 300.0, 20.0))] + [
        Row("cudaLaunchKernel", 0.0)
    ]
    assert split.parts_of(rows, 20) == {"memset": 2.0, "pass": 100.0, "sample": 15.0, "other": 1.0}


def test_clocks_of_a_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = machine.Clocks(tmp_path / "smi.csv")
    assert clocks.mark() == 0 and clocks.since(0) == {}
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        '#!/bin/sh\necho "$*" >&2; echo "1980, 2619, 310.5, 41"; echo "[N/A], 1"; echo "1755, 2619, 650, 55"; sleep 50\n'
    )
    smi.chmod(0o755)
    monkeypatch.setattr(machine, "tool", lambda name: str(smi))
    clocks.start()
    deadline = time.monotonic() + 10
    while clocks.mark() < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    clocks.stop()
    assert "--query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu" in (tmp_path / "smi.csv").read_text()
    assert clocks.since(0) == {
        "sm_mhz": [1755, 1980],
        "memory_mhz": [2619, 2619],
        "watt": [310.5, 650],
        "celsius": [41, 55],
    }
    assert clocks.since(3)["sm_mhz"] == [1755, 1755]


def test_the_models_are_what_they_are_called() -> None:
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in model.parameters()) for model in (models.ResNet(), models.Gpt())]
    assert sizes == [25_557_032, 124_439_808]


# ---- the texts, from a made-up run


def record(numel: int, ms: float, baselines: dict[str, float], data: str = "gaussian") -> dict[str, Any]:
    labels = {"kernel": "select_topk", "data": data, "numel": numel, "density": 0.001}
    return {**labels, "metric": "time", "unit": "ms", "value": ms, "baselines": baselines}


RESULTS: dict[str, Any] = {
    "benchmark-aims": [
        record(100_000_000, 0.5, {"memcpy": 0.8 / 3, "torch.topk": 1.25, "cub": 0.625}),
        record(25_000_000, 0.2, {"memcpy": 0.2 / 3}),
        record(6_553_600, 0.0801, {"memcpy": 0.02}, "gaussian, segments"),
    ],
    "benchmark-rest": [{**record(6_553_600, 0.995, {}, "real text"), "metric": "hit_rate"}],
    "split": {"25M, 0.1 %": {"numel": 25_000_000, "density": 0.001, "us": 200.0, "parts": {"pass": 130.0, "finish": 60.0}, "gaps": 10.0}},
    "ncu": {"25M, 0.1 %": {"pass": {"Duration, us": 130.0, "DRAM Throughput": 76.5}}},
    "resnet50": {
        "parameters": 25_557_032,
        "plain DDP": {"ms": 60.0, "tail_ms": 0.2},
        "plain DDP, again": {"ms": 64.0, "tail_ms": 0.2},
        "top-k": {"ms": 63.0, "tail_ms": 0.8, "worker_ms": {"select": 3.0, "exchange": 1.0, "write_back": 0.5}},
        "gTop-k": {"ms": 68.2, "tail_ms": 2.8, "worker_ms": {"select": 3.5, "exchange": 2.0, "write_back": 0.5}},
        "plain DDP, GradScaler": {"ms": 64.0, "tail_ms": 0.3},
        "top-k, GradScaler": {"ms": 66.56, "tail_ms": 1.1, "worker_ms": {"select": 3.0, "exchange": 1.0, "write_back": 0.5}},
    },
    "host": {"select_topk": 61.2},
}  # fmt: skip


def made_up(device: str = "NVIDIA H100 80GB HBM3", results: dict[str, Any] = RESULTS) -> dict[str, Any]:
    passed = {
        "name": "build",
        "verdict": "pass",
        "seconds": 20.0,
        "detail": "sm_90",
        "gpu": {"sm_mhz": [1755.0, 1980.0]},
    }
    late = {
        "name": "stress",
        "verdict": "timed out",
        "seconds": 60.0,
        "detail": "not done after 60 s in 'turns'",
    }
    return {
        "device": device, "date": "2026-12-01", "torch": "2.11.0+cu130", "commit": None, "dry_run": False, "seconds": 420.0,
        "checks": [passed, late], "targets": targets(results, device, [passed, late]), "results": results,
    }  # fmt: skip


def test_targets_from_made_up_results() -> None:
    rows = targets(RESULTS, "NVIDIA H100 80GB HBM3", [])
    assert [(row["wanted"], row["measured"], row["met"]) for row in rows] == [
        (">= 80", 80.0, True),
        (">= 60", 50.0, False),
        ("<= 80", 80.1, False),
        (">= 2", 2.5, True),
        (">= 1.4", 1.25, False),
        ("<= 5", 10.0, False),  # gTop-k, against the mean of the two measurements of plain DDP
        ("<= 5", None, None),
        (">= 99", 99.5, True),
        ("<= 0", None, None),
    ]
    assert rows[1]["why"] == (
        "of 200 us: pass 130 (its 12 n bytes at a copy's speed: 100.0), finish 60, between kernels 10; "
        "pass: DRAM Throughput 76.5 %"
    )
    assert "gTop-k: 68.2 ms a step against 60; after the last gradient 2.8 ms against 0.2" in rows[5]["why"]
    assert rows[0]["why"] == "" and rows[2]["why"] == "no kernel split"


def test_other_cards_have_the_percentages_only() -> None:
    rows = targets(RESULTS, "NVIDIA H200", [])
    assert [row["met"] for row in rows] == [True, False, None, None, None, False, None, True, None]
    assert rows[2]["measured"] == 80.1


def test_all_tests_and_sanitizers_clean_is_a_target() -> None:
    def told(**seen: str) -> tuple[int | None, bool | None, str]:
        row = targets({}, "", [{"name": name, "verdict": verdict} for name, verdict in seen.items()])[-1]
        return row["measured"], row["met"], row["why"]

    assert told(build="fail") == told(memcheck="skip") == (None, None, "")
    assert told(memcheck="pass", stress="skip") == (0, True, "")
    assert told(memcheck="pass", stress="timed out", DDP="not run") == (2, False, "stress, DDP")
    names = {check.name for check in checks.CHECKS}
    assert (
        set(CLEAN + SANITIZERS) == {check.name for check in checks.CHECKS if check.beside}
        and set(CLEAN) < names
    )


def test_every_target_is_measured_by_the_benchmark() -> None:
    """The records that targets look for exist: sizes, data and baselines are the benchmark's."""
    assert set(kernels_cuda.AIMED) == {6_553_600, 25_000_000, 100_000_000} and 0.001 in kernels_cuda.DENSITIES
    cases = {numel for numel, density, _ in split.CASES.values() if density == 0.001}
    assert cases == set(kernels_cuda.AIMED)
    for name in ("100M, 0.1 %", "25M, 0.1 %", "6.55M, 0.1 %, segments"):
        assert name in split.CASES


def test_the_report_is_one_page() -> None:
    text = page.report(made_up())
    assert text.startswith("# gpu_check: NVIDIA H100 80GB HBM3, 2026-12-01\n\n1 pass, 1 timed out; 420 s.")
    assert (
        "| select_topk, 25M, 0.001: % of a copy's bandwidth | >= 60 | 50 | **not met**: of 200 us: pass 130"
        in text
    )
    assert "| GPT of 124M, worst sparse hook: % of the step | <= 5 | not measured |  |" in text
    assert (
        "| gTop-k | 68.2 | +10.0 | 2.8 | 3.5, 2, 0.5 |" in text and "| plain DDP | 60 |  | 0.2 |  |" in text
    )
    assert "| top-k, GradScaler | 66.56 | +4.0 | 1.1 |" in text  # of plain DDP with a GradScaler
    assert "| plain DDP, GradScaler | 64 |  | 0.3 |  |" in text
    assert "| build | pass | 20 | 1755 to 1980 |  |  | sm_90 |" in text and "select_topk 61.2" in text
    assert "| stress | timed out | 60 |  |  |  | not done after 60 s in 'turns' |" in text
    assert len(text.splitlines()) < 70


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the pages, in which ``publish`` writes."""
    for name in pages.PAGES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / page.FOLDER).mkdir()
    monkeypatch.setattr(page, "ROOT", tmp_path)
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    return tmp_path


def test_publishing(checkout: Path) -> None:
    """One command: the record, and the same words wherever a reader looks."""
    out = checkout / "out"
    out.mkdir()
    for run, message in (
        ({**made_up(), "dry_run": True}, "dry run"),
        (made_up(results={}), "no figure of any target"),
    ):
        (out / "gpu.json").write_text(json.dumps(run))
        with pytest.raises(ValueError, match=message):
            page.publish(out)
    (out / "gpu.json").write_text(json.dumps(made_up()))
    assert page.publish(out)[0] == checkout / "docs" / "performance" / "gpu-nvidia-h100-80gb-hbm3.json"
    assert page.published() == [made_up()]
    readme, kernels, performance = (
        (checkout / name).read_text() for name in ("README.md", "docs/kernels-cuda.md", "docs/performance.md")
    )
    for text in (readme, kernels, performance):
        assert "3 of 8 targets met, not passed: stress." in text and "**Never run between two GPUs**" in text
        assert "Never run on a GPU" not in text
    assert "](docs/performance.md#on-one-gpu)" in readme and "](performance.md#on-one-gpu)" in kernels
    assert "### NVIDIA H100 80GB HBM3" in performance and "#### Step time: ResNet-50" in performance
    page.publish(out)
    assert (checkout / "docs" / "performance.md").read_text() == performance  # again: nothing twice
    (out / "gpu.json").write_text(json.dumps(made_up("NVIDIA H200")))
    page.publish(out)
    assert "### NVIDIA H200" in (checkout / "docs" / "performance.md").read_text()


def test_as_long_as_nothing_was_published_the_pages_say_so() -> None:
    """That a page says what was published is a test of all rendered pages."""
    for name in ("README.md", "docs/kernels-cuda.md", "docs/performance.md"):
        text = (ROOT / name).read_text()
        assert ("Never run on a GPU" in text) == (not page.published()) and "between two GPUs" in text


# ---- all of it, without a GPU

ABSENT = (
    "numpy",
    "scipy",
    "sklearn",
    "matplotlib",
    "cupy",
    "mpi4py",
    "horovod",
    "torchvision",
    "transformers",
)
ONLY_TORCH = f"""
import sys
from importlib.machinery import PathFinder
class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {ABSENT} else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_dry_run(tmp_path: Path) -> None:
    """Every command is built and every program runs, with torch and the standard library alone."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(ONLY_TORCH)
    paths = [str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("COMMHOOKS_REQUIRE", None)  # its native tests are skipped where there is no GPU
    command = [
        sys.executable,
        "scripts/gpu_check",
        "--output",
        str(tmp_path / "out"),
        "--work",
        str(tmp_path / "work"),
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    unwell = [
        line for line in done.stdout.splitlines() if re.match(r"\| .* \| (fail|timed out|not run) ", line)
    ]
    assert done.returncode == 3, "\n".join([*unwell, done.stdout[-6000:], done.stderr[-2000:]])
    written = json.loads((tmp_path / "out" / "gpu.json").read_text())
    seen = verdicts(tmp_path)
    assert list(seen) == [check.name for check in checks.CHECKS] and written["dry_run"] is True
    skipped = {
        "ncu",
        "CuPy and array interface",
        "native tests",
        "memcheck",
        "racecheck",
        "initcheck",
        "synccheck",
    }
    if seen["build"] == "pass":
        assert {name for name, verdict in seen.items() if verdict != "pass"} == skipped
        assert set(written["results"]) == {
            "benchmark-aims",
            "benchmark-rest",
            "split",
            "stress",
            "host",
            "resnet50",
            "gpt",
        }
        assert {r["data"] for r in written["results"]["benchmark-rest"]} >= {
            "clustered",
            "missed",
            "real text",
            "heavy",
        }
        assert list(written["results"]["split"]) == list(split.CASES)
        assert list(written["results"]["gpt"])[1:] == list(written["results"]["resnet50"])[1:]
    else:
        assert seen["build"] == "skip"  # no C++ compiler: nothing can be emulated
    logs = "".join(file.read_text() for file in sorted((tmp_path / "work" / "logs").glob("*.log")))
    for tool in (
        "nvcc",
        "ncu",
        *(f"compute-sanitizer --tool {kind}" for kind in ("memcheck", "racecheck", "initcheck", "synccheck")),
    ):
        assert re.search(rf"^would run: \S*{tool}", logs, re.MULTILINE), tool
    report = (tmp_path / "out" / "report.md").read_text()
    assert report.startswith("# gpu_check: A dry run: no GPU, no figure") and "not measured" not in report
    assert sorted(os.listdir(tmp_path / "out")) == ["gpu.json", "logs.tar.gz", "report.md"]


def test_without_torch_nothing_is_claimed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = gpu_check()

    def missing() -> bool:
        raise ImportError("No module named 'torch'")

    monkeypatch.setattr(module, "has_gpu", missing)
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    assert module.main() == 3 and "nothing was checked" in capsys.readouterr().err


def test_an_unknown_check_is_an_error_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = gpu_check()
    monkeypatch.setattr(module, "has_gpu", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--only", "nuc", "--output", str(tmp_path / "out")])
    assert module.main() == 1 and "no check is called 'nuc'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
