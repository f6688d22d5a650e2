"""The checks of gpu_check, one a function, and the table that says in which order and for how long they run."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from collections.abc import Sequence

from gpu import build
from gpu.machine import ROOT, tool
from gpu.runner import STEP, Check, Job, Skipped

NAMESPACE = "commhooks"  # in the mangled name of each of our kernels, and of no other
PATHS = (ROOT, ROOT / "scripts", ROOT / "tests", ROOT / "tests" / "native")
NCU_SECTIONS = ("SpeedOfLight", "Occupancy", "WarpStateStats", "MemoryWorkloadAnalysis")
NCU_METRICS = (
    "Duration",
    "DRAM Throughput",
    "Compute (SM) Throughput",
    "Achieved Occupancy",
    "Theoretical Occupancy",
)


def environment(job: Job) -> dict[str, str]:
    """For every Python program: the checkout, the libraries that were built here, stacks when it is ended."""
    paths = [str(path) for path in PATHS] + [os.environ.get("PYTHONPATH", "")]
    given = {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1" if job.dry else "4",
    }
    return given if job.dry else {**given, "COMMHOOKS_LIBRARY_DIR": str(build.libraries(job.runner))}


def where(job: Job) -> list[str]:
    """A program's options in a dry run."""
    return ["--dry-run", "--library", str(build.emulated(job.runner))] if job.dry else []


def needs_kernels(job: Job) -> None:
    """Raises Skipped in a dry run on a machine that cannot emulate the kernels."""
    if job.dry and not build.emulated(job.runner).is_file():
        raise Skipped("no GPU, and no emulator")


def program(job: Job, name: str, *arguments: str, result: str = "", behind: Sequence[str] = ()) -> str:
    """Output of ``gpu.programs.NAME``, perhaps behind a tool. ``result``: the name of its figures."""
    command = [*behind, sys.executable, "-m", f"gpu.programs.{name}", *arguments, *where(job)]
    if result:
        command += ["--json", str(job.result(result))]
    return job.run(command, **environment(job))


def last_line(text: str) -> str:
    """The summary that every program ends with."""
    return (text.strip().splitlines() or [""])[-1]


def smoke(job: Job) -> str:
    """Every kernel and path once, against the reference on the CPU."""
    return last_line(cuda_runs(job, "few" if job.dry else "small"))


def cuda_runs(job: Job, what: str, *behind: str, raw_scratch: bool = False, **more: str) -> str:
    """``tests/native/cuda_runs.py``, perhaps behind a sanitizer."""
    needs_kernels(job)
    command = [*behind, sys.executable, str(ROOT / "tests" / "native" / "cuda_runs.py"), what]
    device = (
        ["--device", "cpu", "--library", str(build.emulated(job.runner))] if job.dry else ["--device", "cuda"]
    )
    raw = ["--raw-scratch"] if raw_scratch else []
    return job.run([*command, *device, *raw], **environment(job), **more)


def nccl(job: Job) -> str:
    """Every NCCL call of the transport, from a rank to itself."""
    return last_line(program(job, "nccl_self"))


def benchmark(job: Job, part: str) -> str:
    """A part of the benchmark: ``aims``, which the targets are about, or the ``rest``."""
    needs_kernels(job)
    arguments, about = ([], "without CUB") if job.dry else build.rival(job)
    done = program(job, "benchmark", part, *arguments, result=f"benchmark-{part}.jsonl")
    return f"{last_line(done)}, {about}"


def aims(job: Job) -> str:
    """The part of the benchmark that the targets are about."""
    return benchmark(job, "aims")


def split(job: Job) -> str:
    """The device's time by kernel."""
    needs_kernels(job)
    return last_line(program(job, "split", result="split.json"))


def ncu(job: Job) -> str:
    """What limits sample, pass and finish, as Nsight Compute sees it."""
    found = tool("ncu")
    sections = [part for name in NCU_SECTIONS for part in ("--section", name)]
    behind = [found or "ncu", "--profile-from-start", "off", "--clock-control", "none", *sections]
    behind += ["--kernel-name", "regex:sample_kernel|pass_kernel|finish_kernel"]
    if job.dry:
        job.show([*behind, sys.executable, "-m", "gpu.programs.split", "--once"])
        raise Skipped("no GPU; the program behind it is the one of the kernel split")
    if found is None:
        raise Skipped("no ncu")
    seen = read_ncu(program(job, "split", "--once", behind=behind))
    job.result("ncu.json").write_text(json.dumps(seen))
    if not seen:
        raise RuntimeError("ncu said nothing on our kernels: see its log")
    return f"{sum(len(kernels) for kernels in seen.values())} kernels"


def read_ncu(text: str) -> dict[str, dict[str, dict[str, float]]]:
    """Metrics by case of split.py and by kernel, out of the details page, which ncu prints after the program's own output.

    Cases and selections come in the same order, and a selection begins with its sample.
    """
    cases = [line.removeprefix(STEP).strip() for line in text.splitlines() if line.startswith(STEP)]
    seen: dict[str, dict[str, dict[str, float]]] = {}
    metrics: dict[str, float] = {}
    for line in text.splitlines():
        if found := re.match(r"\s{2}\S.*?(\w+)_kernel\b.*\bCC \d", line):
            if found[1] == "sample" and cases:
                seen[cases.pop(0)] = {}
            metrics = {}
            if seen:
                seen[list(seen)[-1]][found[1]] = metrics
        elif found := re.match(r"\s{4}(\S.*?)\s{2,}(\S+)\s+([\d.,]+)\s*$", line):
            if found[1] in NCU_METRICS:
                name = found[1] if found[2] == "%" else f"{found[1]}, {found[2]}"
                metrics[name] = float(found[3].replace(",", ""))
    return seen


def resnet50(job: Job) -> str:
    """Step time of ResNet-50 with the hooks and without."""
    return last_line(program(job, "step_time", "resnet50", result="resnet50.json"))


def gpt(job: Job) -> str:
    """The same of a GPT."""
    return last_line(program(job, "step_time", "gpt", result="gpt.json"))


def host(job: Job) -> str:
    """What a call costs Python."""
    needs_kernels(job)
    return last_line(program(job, "host_cost", result="host.json"))


def stress(job: Job) -> str:
    """The same selections again and again, by different paths."""
    needs_kernels(job)
    return last_line(program(job, "stress", result="stress.json"))


def pytest(job: Job, chosen: str) -> str:
    """``tests/native/test_cuda.py``, or a part of it; a hang is told by the test's name."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "--durations=5",
        "-k",
        chosen,
    ]
    if importlib.util.find_spec("pytest_timeout") is not None:
        command += ["--timeout=60", "--timeout-method=thread"]
    if importlib.util.find_spec("pytest") is None:
        raise Skipped("no pytest")
    last = last_line(job.run([*command, "tests/native/test_cuda.py"], **environment(job))).strip("= ")
    if " passed" not in last:
        raise Skipped(f"no test ran: {last}")
    return last


def native_tests(job: Job) -> str:
    """The kernels against the reference; without pytest the main comparisons."""
    if importlib.util.find_spec("pytest") is None:
        return f"without pytest: {last_line(cuda_runs(job, 'few' if job.dry else 'all'))}"
    return pytest(job, "not cupy and not array_interface")


def arrays(job: Job) -> str:
    """Arrays of CuPy and by ``__cuda_array_interface__``, on several streams."""
    if job.dry:
        raise Skipped("no GPU; these are of the native tests")
    return pytest(job, "cupy or array_interface")


def ranks(job: Job) -> str:
    """P = 2, 4, 5 ranks in one process on the device."""
    return last_line(program(job, "ranks"))


def ddp(job: Job) -> str:
    """DDP over NCCL and gloo, one rank, against the CPU."""
    return last_line(program(job, "ddp"))


def two_ranks(job: Job) -> str:
    """Two processes on one GPU over gloo, against the CPU."""
    return last_line(program(job, "ddp", "--ranks", "2"))


def horovod(job: Job) -> str:
    """The Horovod adapter on the device; Horovod is a stand-in."""
    return last_line(program(job, "horovod"))


def rest(job: Job) -> str:
    """The benchmark without what the targets are about."""
    return benchmark(job, "rest")


def sanitize(job: Job, kind: str, what: str) -> str:
    """One tool of compute-sanitizer on our kernels; memcheck must also see a fault that is made on purpose."""
    found = tool("compute-sanitizer")
    if job.dry:
        job.show(
            [
                *sanitizer(kind, "compute-sanitizer", "--kernel-name"),
                sys.executable,
                "tests/native/cuda_runs.py",
                what,
            ]
        )
        raise Skipped("no GPU; the program behind it is the one of the smoke check")
    if found is None:
        raise Skipped("no compute-sanitizer")
    help_text = job.run([found, "--help"])
    # Instrumenting all of torch's kernels takes minutes. Older toolkits have the second name.
    option = next((name for name in ("--kernel-name", "--kernel-regex") if name in help_text), "")
    behind = sanitizer(kind, found, option)
    # Without torch's cache each tensor is an allocation of its own, so that leaving it is seen.
    # Poisoned scratch memory counts as initialized: initcheck gets it as it is allocated.
    raw = kind == "initcheck"
    said = cuda_runs(job, what, *behind, raw_scratch=raw, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    if kind == "memcheck":
        try:
            seen = cuda_runs(job, "fault", *behind, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        except RuntimeError as error:  # the program fails of it too
            seen = str(error)
        if re.search(r"ERROR SUMMARY: [1-9]", seen) is None:
            raise RuntimeError(f"memcheck did not see a read out of bounds in our kernel: {seen[-1000:]}")
    return " ".join(said.strip().splitlines()[-2:])


def sanitizer(kind: str, found: str, option: str) -> list[str]:
    """The sanitizer's part of the command; ``option`` keeps it to our kernels."""
    command = [
        found,
        "--tool",
        kind,
        "--error-exitcode",
        "9",
        *([option, f"kns={NAMESPACE}"] if option else []),
    ]
    return command + (["--report-api-errors", "no"] if kind == "memcheck" else [])


def _sanitizer(kind: str, what: str, limit_s: float) -> Check:
    return Check(kind, lambda job: sanitize(job, kind, what), limit_s, "sanitizers")


#: In order of worth: what the targets need is through after two and a half minutes. Timings run alone; what only says right
#: or wrong runs side by side.
CHECKS = (
    Check("build", build.build, 90),
    Check("smoke", smoke, 40),
    Check("NCCL to itself", nccl, 40),
    Check("targets", aims, 90),
    Check("kernel split", split, 30),
    Check("ncu", ncu, 50),
    Check("ResNet-50", resnet50, 70),
    Check("GPT", gpt, 60),
    Check("stress", stress, 60, "tests"),
    Check("native tests", native_tests, 110, "tests"),
    Check("CuPy and array interface", arrays, 60, "tests"),
    Check("ranks on one device", ranks, 60, "tests"),
    Check("DDP", ddp, 70, "tests"),
    Check("two ranks on one GPU", two_ranks, 70, "tests"),
    Check("Horovod", horovod, 40, "tests"),
    Check("host cost", host, 25),
    Check("benchmark, the rest", rest, 80),
    _sanitizer("memcheck", "small", 100),
    _sanitizer("racecheck", "few", 100),
    _sanitizer("initcheck", "few", 100),
    _sanitizer("synccheck", "few", 100),
)


def named(only: list[str], skip: list[str]) -> list[Check]:
    """The checks to run. The build goes first unless it is skipped: then what an earlier run built is used.

    Raises:
        ValueError: a name that is none.
    """
    names = [check.name for check in CHECKS]
    for name in (*only, *skip):
        if name not in names:
            raise ValueError(f"no check is called {name!r}; there are: {', '.join(names)}")
    wanted = {*only, "build"} if only else set(names)
    return [check for check in CHECKS if check.name in wanted - set(skip)]
