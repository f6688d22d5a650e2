"""The CUDA kernels on a GPU against the reference on the CPU, bit for bit; run by scripts/gpu_check."""

from __future__ import annotations

import threading
from dataclasses import replace

import cuda_cases as cases
import cuda_runs as runs
import pytest
import torch

from commhooks.interop import arrays, dlpack
from commhooks.native import abi, cuda, ops, reference
from commhooks.native.fused import Fused

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    if abi.cuda() is None:
        pytest.skip(f"{abi.path('cuda')} was not built")
    monkeypatch.setattr(cuda, "_scratch", cuda._scratch)  # taken back after the test
    runs.poison_scratch()


def test_select_topk() -> None:
    misses = runs.select_topk("cuda", (0, 1, 2, 31, 517, 5003, 90_001), every=2)
    misses += runs.select_topk("cuda", (1_000_003,), every=7)
    assert misses > 0, "the miss path was never taken"


def test_every_half_is_read_right() -> None:
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        fused = Fused(patterns.view(dtype), torch.zeros(patterns.numel()))
        cases.check_select_topk("cuda", fused, 3000, f"every {dtype}")


def test_select_others() -> None:
    runs.select_others("cuda", (0, 1, 700, 40_001, 300_007), every=3)
    runs.segments("cuda")
    for numel, k in ((100, 10), (200_000, 2000), (3_000_000, 3000)):
        cases.check_sample_threshold("cuda", numel, k)


def test_lists() -> None:
    runs.random_and_merge("cuda", large=True)
    runs.write("cuda")
    runs.messages("cuda")


def test_low_bit() -> None:
    runs.low_bit("cuda", (0, 1, 255, 256, 257, 4097, 300_007))


def test_nan_in_the_memory() -> None:
    runs.nan_memory("cuda", (1, 63, 1009, 20_011, 1_000_003))


def test_large_buckets_and_guesses() -> None:
    """The sizes that training uses; the guess holds on data that is not degenerate."""
    misses = 0
    for turn, (numel, k) in enumerate(((6_553_600, 6554), (6_553_600, 65_536), (25_000_000, 25_000))):
        for kind in ("gaussian", "heavy"):
            fused = cases.make_fused(kind, numel, torch.float32, turn, options=2 * (turn % 2))
            misses += cases.check_select_topk("cuda", fused, k, f"{kind} numel {numel} k {k}", seed=turn)
    assert misses <= 1
    for kind in ("equal", "clustered", "ties"):
        fused = cases.make_fused(kind, 6_553_600, torch.float32, 1)
        cases.check_select_topk("cuda", fused, 6554, f"{kind}, large")


def test_repeated_steps() -> None:
    """Error feedback over steps; the same result on every run of the same inputs."""
    numel, k = 400_009, 4001
    mine = cases.on_device(cases.make_fused("gaussian", numel, torch.float32, 1, options=3), "cuda")
    again = cases.on_device(mine, "cuda")
    theirs = cases.on_device(mine, "cpu")
    for step in range(8):
        ours = cuda.select_topk(mine, k, step)
        twice = cuda.select_topk(again, k, step + 100)
        expected = reference.select_topk(theirs, k)
        cases.same_selection(ours, expected, mine, theirs, f"step {step}")
        cases.same_selection(twice, expected, again, theirs, f"step {step}, another sample")


def test_nearly_two_to_the_31st() -> None:
    """Index arithmetic at the largest size; the winners are planted."""
    numel, k = 2**31 - 2, 1000
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GB of free memory on the device")
    where = torch.cat((torch.tensor([0, numel - 1]), torch.randint(1, numel - 1, (2 * k,)).unique()[: k - 2]))
    where = where.sort().values.cuda()
    grad = torch.zeros(numel, dtype=torch.bfloat16, device="cuda").uniform_(-1.0, 1.0)
    residual = torch.zeros(numel, device="cuda")
    residual[where] = torch.linspace(5.0, 9.0, where.numel(), device="cuda")
    expected = (residual[where] + grad[where].float()).clone()
    got = ops.select_topk(Fused(grad, residual), where.numel())
    assert torch.equal(got.indices.long(), where)
    assert torch.equal(got.values, expected)
    assert got.report[:2].tolist() == [where.numel(), 0]
    assert not residual[where].any()
    last = int(where[-1])
    assert residual[last - 1] == grad[last - 1].float()


def test_nearly_two_to_the_31st_after_a_miss() -> None:
    """All magnitudes are equal, so no guess holds; the winners are the first indices."""
    numel, k = 2**31 - 2, 2_000_000
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GB of free memory on the device")
    grad = torch.full((numel,), 0.5, dtype=torch.bfloat16, device="cuda")
    residual = torch.zeros(numel, device="cuda")
    got = ops.select_topk(Fused(grad, residual), k)
    assert got.report.tolist() == [k, 0, 1, 0]
    assert torch.equal(got.indices, torch.arange(k, dtype=torch.int32, device="cuda"))
    assert bool((got.values == 0.5).all()) and not residual[:k].any()
    assert float(residual[k]) == 0.5 and float(residual[-1]) == 0.5


def test_the_order_between_blocks_under_stress() -> None:
    """20,000 selections beside other work: the seed changes the path, never the bits."""
    sizes = (6_553_600, 1_000_003, 90_001)
    fused = {
        n: cases.on_device(cases.make_fused("gaussian", n, torch.float32, 1, options=2), "cuda")
        for n in sizes
    }
    want, left = {}, {}
    for n in sizes:
        copy = cases.on_device(fused[n], "cuda")
        want[n], left[n] = cuda.select_topk(copy, n // 1000), copy.residual
    noise, a = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    room = {n: torch.empty(n, device="cuda") for n in sizes}
    for turn in range(20_000):
        n = sizes[turn % 3]
        room[n].copy_(fused[n].residual)
        if turn % 4 == 0:
            with torch.cuda.stream(noise):
                torch.mm(a, a)  # takes multiprocessors away
        out = cuda.select_topk(replace(fused[n], residual=room[n]), n // 1000, turn)
        same = (out.values == want[n].values).all() & (out.indices == want[n].indices).all()
        wrong += ~(same & (room[n] == left[n]).all())  # read once, at the end
    assert int(wrong) == 0


def test_hostile_indices() -> None:
    runs.hostile_indices("cuda", 100)


def test_streams_and_threads() -> None:
    """Calls on several streams from several threads at once do not disturb each other."""
    wrong: list[str] = []

    def work(seed: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for turn in range(10):
                fused = cases.make_fused("gaussian", 150_001, torch.float32, 100 * seed + turn)
                try:
                    cases.check_select_topk("cuda", fused, 1500, f"thread {seed} turn {turn}")
                except AssertionError as error:
                    wrong.append(str(error))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_capture_into_a_graph() -> None:
    """Nothing waits or allocates on the device: so a whole selection can be captured and replayed."""
    start = cases.make_fused("gaussian", 300_007, torch.float32, 9, options=2)
    mine, theirs = cases.on_device(start, "cuda"), cases.on_device(start, "cpu")
    cuda.select_topk(cases.on_device(start, "cuda"), 3000)  # loads the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours = cuda.select_topk(mine, 3000)
    for step in range(3):
        graph.replay()
        torch.cuda.synchronize()
        cases.same_selection(ours, reference.select_topk(theirs, 3000), mine, theirs, f"replay {step}")


def test_no_synchronisation() -> None:
    mine = cases.on_device(cases.make_fused("ties", 300_007, torch.float32, 9, options=7), "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = ops.select_topk(mine, 3000)
        ops.scatter_add(mine.residual, got.values, got.indices)
        ops.merge_topk(got.values, got.indices, got.values, got.indices, 3000)
        ops.random_indices(1, 2, 3, 300_007, 100, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_dispatch_and_errors() -> None:
    fused = cases.on_device(cases.make_fused("gaussian", 1000, torch.float32, 1), "cuda")
    with pytest.raises(ValueError, match="k must be"):
        ops.select_topk(fused, 1001)
    with pytest.raises(ValueError, match="k must be"):
        cuda.select_topk(fused, 1001)
    assert ops._implementation(torch.device("cuda")) is cuda


@pytest.mark.parametrize("which", ["null", "non-blocking", "per thread"])
def test_cupy(which: str) -> None:
    """CuPy arrays on CuPy's stream: the same memory in and out, and ordered without waiting."""
    cupy = pytest.importorskip("cupy")
    streams = {"null": cupy.cuda.Stream.null, "per thread": cupy.cuda.Stream.ptds}
    stream = streams.get(which) or cupy.cuda.Stream(non_blocking=True)
    with stream:
        residual = cupy.zeros(200_003, dtype=cupy.float32)
        grad = cupy.arange(200_003, dtype=cupy.float32) - 100_000
        with dlpack.stream_of(grad):
            # The default streams are in order with torch's own.
            assert torch.cuda.current_stream().cuda_stream == (stream.ptr if which == "non-blocking" else 0)
        assert dlpack.to_tensor("residual", residual, written=True).data_ptr() == residual.data.ptr
        values, indices = arrays.topk(grad, 3, residual=residual)
        assert isinstance(values, cupy.ndarray) and isinstance(indices, cupy.ndarray)
        assert values.tolist() == [-100_000.0, 100_001.0, 100_002.0]  # of the tie the lower index
        assert float(residual[0]) == 0.0 and float(residual[200_000]) == 100_000.0

        merged = arrays.merge(values, indices, values[:1], indices[:1], 2)
        assert all(isinstance(part, cupy.ndarray) for part in merged)
        assert merged.values.tolist() == [-200_000.0, 100_002.0]
        assert merged.survives_a.dtype == cupy.bool_ and merged.survives_b.dtype == cupy.bool_
        assert merged.survives_a.tolist() == [True, False, True] and merged.survives_b.tolist() == [True]

        halves = cupy.array([0.5, -2.0, 1.0], dtype=cupy.float16)  # CuPy has no bfloat16
        memory = cupy.zeros(3, dtype=cupy.float32)
        assert arrays.topk(halves, 1, residual=memory).values.tolist() == [-2.0]
        assert memory.tolist() == [0.5, 0.0, 1.0]


def test_cupy_keeps_up_with_its_stream() -> None:
    """What CuPy has queued before is seen, what it queues afterwards sees the result."""
    cupy = pytest.importorskip("cupy")
    with cupy.cuda.Stream(non_blocking=True):
        grad, residual = cupy.zeros(1 << 24, dtype=cupy.float32), cupy.zeros(1 << 24, dtype=cupy.float32)
        for turn in range(20):
            grad += cupy.sqrt(grad) * 0  # work ahead
            grad[turn] = 100.0
            values, indices = arrays.topk(grad, 1, residual=residual)
            grad[turn] = 0.0
            residual += 0
            assert (int(indices[0]), float(values[0])) == (turn, 100.0)


class Plain:
    """GPU memory by ``__cuda_array_interface__`` alone."""

    def __init__(self, tensor: torch.Tensor, stream: int | None) -> None:
        self.tensor, self.stream = tensor, stream

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        return {**self.tensor.__cuda_array_interface__, "version": 3, "stream": self.stream}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_cuda_array_interface(dtype: torch.dtype) -> None:
    """The memory itself is updated, after what its stream still has to do."""
    side = torch.cuda.Stream()  # does not wait for the default stream, nor that for it
    grad, residual = torch.zeros(1000, dtype=dtype, device="cuda"), torch.zeros(1000, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        grad[7], residual[9] = 3.0, -5.0
    selected = arrays.topk(Plain(grad, side.cuda_stream), 1, residual=Plain(residual, side.cuda_stream))
    assert isinstance(selected.values, torch.Tensor)  # there is no library to give the result back to
    assert (selected.indices.tolist(), selected.values.tolist()) == ([9], [-5.0])
    assert float(residual[7]) == 3.0 and float(residual[9]) == 0.0
    for stream in (None, 1, 2):
        assert arrays.topk(Plain(grad, stream), 1).indices.tolist() == [7]
    with pytest.raises(ValueError, match="stream 0"):
        arrays.topk(Plain(grad, 0), 1)


def test_another_gpu_is_told_apart() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    there = torch.zeros(3, device="cuda:1")
    with pytest.raises(ValueError, match="residual is not on the current GPU, cuda:0"):
        arrays.topk(torch.ones(3, device="cuda:0"), 1, residual=Plain(there, None))
    with torch.cuda.device(1):
        arrays.topk(torch.ones(3, device="cuda:1"), 1, residual=Plain(there, None))
    assert there.tolist() == [0.0, 1.0, 1.0]
