"""The logic of the CUDA kernels without a GPU: the same sources, on a small SIMT machine made of fibers.

What this shows: results (bit for bit those of the reference), the miss path, barriers that not all threads reach,
misaligned vector accesses, races. What it cannot show: the memory ordering of a GPU between blocks, and speed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Iterator

import cuda_cases as cases
import cuda_runs as runs
import pytest
import torch
from emulator import build as emulator

from commhooks.native import cuda


@pytest.fixture(scope="module", params=["as it is", "poor guesses"])
def misses_wanted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[bool]:
    """Puts the emulated library in place; True when it is built to miss often."""
    folder = tmp_path_factory.mktemp("emulated")
    reason = emulator.why_not(folder)
    if reason is not None:
        pytest.skip(reason)
    wanted = request.param == "poor guesses"
    before = cuda._loaded, cuda._guard, cuda._stream, cuda._scratch
    runs.emulate(emulator.build(folder, misses=wanted))
    runs.poison_scratch()
    yield wanted
    cuda._loaded, cuda._guard, cuda._stream, cuda._scratch = before


@pytest.mark.parametrize("seed", ["0", "1"])
def test_select_topk(misses_wanted: bool, seed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under two orders in which threads run."""
    monkeypatch.setenv("COMMHOOKS_EMULATE_SEED", seed)
    misses = runs.select_topk("cpu", (0, 1, 2, 31, 517, 5003, 100_001), every=3 if seed == "0" else 11)
    assert misses > 5 if misses_wanted else misses < 100


def test_many_chunks(misses_wanted: bool) -> None:
    """Winners of several chunks of the ordered output, also after a miss."""
    for kind in ("gaussian", "ties", "clustered", "equal"):
        fused = cases.make_fused(kind, 600_011, torch.float32, 5, options=2)
        for k in (600, 60_000):
            cases.check_select_topk("cpu", fused, k, f"{kind} of many chunks, k {k}")
        cases.check_select_threshold("cpu", fused, 1.0, 30_000, 400_000, f"{kind} of many chunks")


def test_select_others(misses_wanted: bool) -> None:
    runs.select_others("cpu", (0, 1, 700, 40_001), every=5)
    for numel, k in ((100, 10), (200_000, 2000), (70_000, 5)):
        if not misses_wanted:
            cases.check_sample_threshold("cpu", numel, k)


def test_segments(misses_wanted: bool) -> None:
    runs.segments("cpu")


def test_a_failure_is_told_once(misses_wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime keeps the error of a failed call; the next call must not fail for it."""
    fused = cases.make_fused("gaussian", 1000, torch.float32, 1)
    monkeypatch.setenv("COMMHOOKS_EMULATE_BAD_MEMSET", "1")
    with pytest.raises(RuntimeError, match="memset: emulated error"):
        cuda.select_topk(cases.on_device(fused, "cpu"), 10)
    monkeypatch.delenv("COMMHOOKS_EMULATE_BAD_MEMSET")
    cases.check_select_topk("cpu", fused, 10, "after a failure")


def test_lists(misses_wanted: bool) -> None:
    if misses_wanted:
        pytest.skip("these kernels do not guess")
    runs.random_and_merge("cpu")
    runs.write("cpu")
    runs.messages("cpu")


def test_low_bit(misses_wanted: bool) -> None:
    if misses_wanted:
        pytest.skip("these kernels do not guess")
    runs.low_bit("cpu", (0, 1, 255, 256, 257, 4097))


def test_hostile_indices(misses_wanted: bool) -> None:
    if misses_wanted:
        pytest.skip("these kernels do not guess")
    runs.hostile_indices("cpu", 25)


def test_nan_in_the_memory(misses_wanted: bool) -> None:
    """With the NaN of this machine, whose payloads are not those of a GPU."""
    runs.nan_memory("cpu", (1, 63, 1009, 20_011))


def test_bad_arguments(misses_wanted: bool) -> None:
    """Told before anything is touched, with a text."""
    fused = cases.make_fused("gaussian", 100, torch.float32, 1)
    with pytest.raises(ValueError, match="k must be in"):
        cuda.select_topk(fused, 101)
    with pytest.raises(ValueError, match="start must be in"):
        cuda.select_threshold(fused, 1.0, 10, 100)
    with pytest.raises(ValueError, match="threshold must be at least 0"):
        cuda.select_threshold(fused, float("nan"), 10, 0)
    with pytest.raises(ValueError, match="out of range"):
        cuda.random_indices(0, 0, 0, 2**31 - 1, 1, torch.device("cpu"))
    with pytest.raises(ValueError, match="rows"):
        out = torch.zeros(4, dtype=torch.float16)
        cuda.write_back(out, torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.int32))


@pytest.mark.slow
def test_races(tmp_path: Path) -> None:
    """ThreadSanitizer sees every fiber as a thread: no two threads touch one place without order."""
    reason = emulator.why_not(tmp_path)
    setarch = shutil.which("setarch")
    runtime = subprocess.run(
        [*emulator.compiler()[:1], "-print-file-name=libtsan.so"], capture_output=True, text=True
    )
    if reason or setarch is None or not Path(runtime.stdout.strip()).is_absolute():
        pytest.skip(reason or "no setarch or no libtsan.so")
    library = emulator.build(tmp_path, misses=True, races=True)
    script = Path(runs.__file__)
    environment = {
        **os.environ,
        "LD_PRELOAD": str(Path(runtime.stdout.strip()).resolve()),
        "TSAN_OPTIONS": "exitcode=66",
        "OMP_NUM_THREADS": "1",
    }
    # Without randomised addresses: ThreadSanitizer's shadow memory has a fixed place.
    command = [
        setarch,
        "-R",
        sys.executable,
        str(script),
        "few",
        "--device",
        "cpu",
        "--library",
        str(library),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    if "unexpected memory mapping" in done.stderr or "personality" in done.stderr:
        pytest.skip("ThreadSanitizer cannot lay out its memory here")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
