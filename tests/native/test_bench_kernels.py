"""`scripts/bench kernels`: its records, and the CUDA cases run through without a GPU: emulated kernels, made-up times."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Iterator

import cuda_runs as runs
import pytest
import torch
from benchmarks import command
from benchmarks.harness.records import load, rounded
from benchmarks.kernels import command as kernels
from benchmarks.kernels import cuda as kernels_cuda
from benchmarks.kernels import cuda_checks as kernels_cuda_checks
from benchmarks.kernels import cuda_tools as kernels_cuda_tools
from benchmarks.kernels import data as kernels_data
from benchmarks.kernels import low_bit
from benchmarks.kernels.data import RealRun
from benchmarks.kernels.records import BASELINES, KEYS, Records, bandwidth, copy_bandwidth, ratio
from benchmarks.kernels.timing import Bench
from emulator import build as emulator
from torch import Tensor

from commhooks.native import abi, cuda, reference

ISSUE_KEYS = "bench kernel data numel density device threads metric unit value baselines".split()
LABELS = {"kernel": "select_topk", "data": "gaussian", "numel": 1000, "density": 0.01}


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    kernels.add_arguments(parser)
    return parser.parse_args(arguments)


def test_records_from_made_up_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = Records("cuda", 0, tmp_path / "new" / "file.jsonl")
    table.time(LABELS, 2.0, {"memcpy": 1.0, "r+=g": 4.0})
    table.add({**LABELS, "metric": "misses", "unit": "1"}, 3)
    table.save()
    records = load(tmp_path / "new" / "file.jsonl")
    assert [list(record) for record in records] == [ISSUE_KEYS] * 2 and tuple(ISSUE_KEYS) == KEYS
    time, misses = records
    assert (time["metric"], time["unit"], time["value"]) == ("time", "ms", 2.0)
    assert [ratio(time, name) for name in ("memcpy", "r+=g", "torch")] == [2.0, 0.5, None]
    # 12 n in 2 ms beside 8 n in 1 ms
    assert bandwidth(time) == 12 * 1000 / 2e6
    assert bandwidth(time) / copy_bandwidth(time) == 0.75  # type: ignore[operator]
    assert (misses["metric"], misses["unit"], misses["value"], misses["baselines"]) == ("misses", "1", 3, {})
    said = capsys.readouterr().out
    assert "(12 n bytes)" in said and "2 x memcpy" in said and "0.5 x r+=g" in said
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "file.jsonl"]


@pytest.mark.parametrize("wrong", ["baseline", "metric"])
def test_no_other_keys_or_baselines(wrong: str) -> None:
    labels = {**LABELS, "metric": "time", "unit": "ms"}
    with pytest.raises(ValueError, match="not a record"):
        if wrong == "metric":
            Records("cpu", 1).add({**labels, "misses": 1}, 1.0)
        else:
            Records("cpu", 1).add(labels, 1.0, {"torch.sort": 1.0})


@pytest.mark.parametrize("given", (["kernels", "--quick"], ["plan-check"]), ids=lambda given: given[0])
def test_refuses_to_measure_without_the_kernels(
    given: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(abi, "cpu", lambda: None)
    assert command.main(given) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert f"scripts/bench {given[0]}: the native kernels are not in use" in said.err
    assert "--allow-reference" in said.err


def test_measures_the_torch_operators_when_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(abi, "cpu", lambda: None)
    monkeypatch.setattr(kernels_data, "_STEPS", 1)
    monkeypatch.setattr(kernels, "_MERGED", (100,))
    given = ["kernels", "--allow-reference", "--sizes", "20000", "--repeats", "1", "--threads", "1"]
    assert command.main(given) == 0
    said = capsys.readouterr().out
    assert "write_back" in said and "missed: not measured" in said


def test_cpu_and_cuda_are_one_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = options("--device", "cuda", "--sizes", "1000")
    assert options().device == "cpu" and given.sizes == [1000]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.run(given) == 3
    assert "nothing was measured" in capsys.readouterr().err


def test_real_gradients_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ImportError("no sklearn")

    monkeypatch.setattr(kernels_data, "digits", missing)
    monkeypatch.setattr(kernels_data, "_STEPS", 3)
    trained = kernels_data.train(0.001)
    assert trained.name == "real text" and trained.steps == len(trained.gradients) == 3
    gradient = trained.gradients[-1]
    assert gradient.isfinite().all() and gradient.numel() > 10**6 and 0.1 < (gradient != 0).float().mean() < 1


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("emulated")
    reason = emulator.why_not(folder)
    if reason is not None:
        pytest.skip(reason)
    before = cuda._loaded, cuda._guard, cuda._stream
    runs.emulate(emulator.build(folder))
    yield
    cuda._loaded, cuda._guard, cuda._stream = before


class TorchAsCub:
    """A rival of the same interface; ``error`` is added to what it takes."""

    def __init__(self, error: float = 0.0) -> None:
        self.error = error

    def run(self, gradient: Tensor, residual: Tensor, k: int) -> tuple[Tensor, Tensor]:
        indices = residual.add_(gradient).abs().topk(k).indices
        values = residual[indices] + self.error
        residual[indices] = 0.0
        return values, indices.int()


def two_calls(call: kernels_cuda_tools.Turn, between: kernels_cuda_tools.Turn, repeats: int) -> float:
    """In place of the device's clock."""
    for turn in range(2):
        between(turn)
        call(turn)
    return 0.5


def test_every_cuda_case(emulated: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_cuda_tools, "ROTATE_BYTES", 1)
    monkeypatch.setattr(kernels_cuda_tools, "_PARAMETERS", (30_000, 256))
    monkeypatch.setattr(kernels_cuda, "MERGED", (250,))
    gradients = [torch.randn(3000) for _ in range(3)]
    monkeypatch.setattr(
        kernels_cuda, "train", lambda density, device: RealRun(gradients, 119, 120, "real text")
    )
    table = Records("cuda", 0, tmp_path / "kernels.jsonl")
    bench = kernels_cuda.Bench(table, cub=TorchAsCub(), timer=two_calls, device="cpu", repeats=2)  # type: ignore[arg-type]
    kernels_cuda.aims(bench, [80_000], [0.001])
    assert {r["data"] for r in table.records} == {"gaussian", "gaussian, segments"}
    assert load(tmp_path / "kernels.jsonl") == rounded(table.records)
    kernels_cuda.rest(bench, [80_000], [0.001])
    records = table.records
    assert load(tmp_path / "kernels.jsonl") == rounded(records)
    assert all(list(record) == ISSUE_KEYS for record in records)
    assert {record["device"] for record in records} == {"cuda"}
    times = {(r["kernel"], r["data"]): r["baselines"] for r in records if r["metric"] == "time"}
    seen = {(r["kernel"], r["data"], r["metric"]) for r in records}
    assert len(seen) == len(records) - 1  # the hit rate of the training run and of its gradients tiled
    assert {name for baselines in times.values() for name in baselines} == {*BASELINES} - {
        "numpy",
        "in place",
    }
    for bits in (1, 2, 4, 8):
        for kernel in ("low_bit_encode", "low_bit_decode_add"):
            assert set(times[kernel, f"gaussian, {bits} bits"]) == {"r*=a"}
    for kernel in ("select_topk", "select_threshold", "select_indices", "write_back"):
        assert {"r+=g", "memcpy"} <= set(times[kernel, "gaussian"])
    for kernel in ("scatter_add", "random_indices", "merge_topk"):
        assert "torch" in times[kernel, "gaussian"]
    assert {"torch", "torch.topk", "cub"} <= set(times["select_topk", "gaussian"])
    hooks = ("segments", "segments, velocity", "segments, bfloat16", "segment inactive")
    for data in ("heavy", "clustered", "real text", "missed", *(f"gaussian, {name}" for name in hooks)):
        assert "r+=g" in times["select_topk", data]
        assert ("select_topk", data, "misses") in seen
    value = {
        (r["data"], r["metric"], r["numel"]): r["value"] for r in records if r["kernel"] == "select_topk"
    }
    assert value["missed", "misses", 80_000] == 2 and value["gaussian", "misses", 80_000] == 0
    assert value["real text", "hit_rate", 3000] == 119 / 120


def test_a_wrong_rival_or_kernel_stops_the_benchmark(emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    gradient = torch.randn(4000)
    kernels_cuda_checks.cub(TorchAsCub(), gradient, 40)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="CUB differs"):
        kernels_cuda_checks.cub(TorchAsCub(1e-6), gradient, 40)  # type: ignore[arg-type]
    monkeypatch.setattr(cuda, "low_bit_decode_add", lambda *arguments: None)
    with pytest.raises(AssertionError, match="low-bit kernels of 4 bits differ"):
        kernels_cuda_checks.low_bit(gradient, 4)
    monkeypatch.setattr(cuda, "scatter_add", lambda *arguments: None)
    with pytest.raises(AssertionError, match="scatter_add differs"):
        kernels_cuda_checks.writes(
            torch.zeros(100), torch.ones(3), torch.tensor([1, 5, 7], dtype=torch.int32)
        )


def test_segments_fill_the_bucket() -> None:
    for numel in (1, 589_824, 589_825, 6_553_600):
        offsets = kernels_cuda_tools.segments_of(numel, "cpu")
        assert offsets[0] == 0 and offsets[-1] == numel and bool((offsets.diff() > 0).all())


@pytest.mark.native
def test_low_bit_rows(tmp_path: Path) -> None:
    """Each width once beside one pass over a vector; a kernel that differs is told before it is timed."""
    bench = Bench(1, 1, False, tmp_path / "file.jsonl")
    low_bit.measure(bench, 3000)
    assert [(record["kernel"], record["data"]) for record in bench.records] == [
        (kernel, f"gaussian, {bits} bits")
        for bits in (1, 2, 4, 8)
        for kernel in ("low_bit_encode", "low_bit_decode_add")
    ]
    assert all(set(record["baselines"]) == {"r*=a"} for record in bench.records)


def test_low_bit_rows_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "low_bit_encode", lambda x, bits, out, remainder: out.zero_())
    with pytest.raises(AssertionError, match="4 bits disagree"):
        low_bit.check(torch.randn(300), 4, 1)
