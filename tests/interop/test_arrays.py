"""Arrays of other libraries: the same memory, never written where it is read-only, in order on a GPU (by stand-ins)."""

from __future__ import annotations

import contextlib
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch

from commhooks.interop import arrays, dlpack


def test_numpy_arrays() -> None:
    grad = np.array([0.1, -3.0, 0.2, 2.0], dtype=np.float32)
    grad.flags.writeable = False
    residual = np.zeros_like(grad)
    values, indices = arrays.topk(grad, 2, residual=residual, scale=2.0)
    assert isinstance(values, np.ndarray) and indices.dtype == np.int32
    assert values.tolist() == [-6.0, 4.0] and indices.tolist() == [1, 3]
    assert np.allclose(residual, [0.2, 0.0, 0.4, 0.0])
    merged = arrays.merge(values, indices, values, indices, 1)
    assert merged.values.tolist() == [-12.0] and merged.survives_b.tolist() == [True, False]
    residual.flags.writeable = False
    with pytest.raises(ValueError, match="residual must be writeable"):
        arrays.topk(grad, 2, residual=residual)
    with pytest.raises(ValueError, match="contiguous"):
        arrays.topk(grad[::-1], 2)


class Exporter:
    """An array that knows nothing but DLPack."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


def test_dlpack_arrays() -> None:
    residual = torch.tensor([0.0, 0.0, 9.0])
    values, indices = arrays.topk(Exporter(torch.ones(3)), 1, residual=Exporter(residual))
    assert values.tolist() == [10.0] and indices.tolist() == [2]
    assert residual.tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("name", ["residual", "velocity"])
def test_what_is_read_only_is_not_overwritten(name: str) -> None:
    """By numpy's flag, by DLPack's, by its refusal in the old form, and where the whole library is immutable."""
    grad = torch.ones(3)
    frozen = np.zeros(3, dtype=np.float32)
    frozen.flags.writeable = False

    class OldExporter(Exporter):
        def __dlpack__(self, stream: Any = None) -> Any:
            return self.array.__dlpack__()

    class JaxArray(Exporter):
        """Exports without the flag, as JAX does."""

    JaxArray.__module__ = "jaxlib._jax"
    others = {"residual": torch.zeros(3), "velocity": torch.zeros(3)}
    for array, message in (
        (frozen, "must be writeable, got a read-only array"),
        (Exporter(frozen), r"must be writeable, got a read-only array \(Exporter\)"),
        (OldExporter(frozen), "cannot be shared by DLPack"),
        (JaxArray(np.zeros(3, dtype=np.float32)), "must be writeable, got an immutable array of jaxlib"),
    ):
        with pytest.raises(ValueError, match=f"{name} {message}"):
            arrays.topk(grad, 1, **{**others, name: array}, momentum=0.5)
    assert not frozen.any() and not others["residual"].any() and not others["velocity"].any()


def test_what_is_read_only_may_be_read() -> None:
    frozen = np.array([1.0, -2.0, 0.5], dtype=np.float32)
    frozen.flags.writeable = False
    assert arrays.topk(Exporter(frozen), 1).indices.tolist() == [1]
    assert dlpack._says_read_only(Exporter(frozen))
    assert not dlpack._says_read_only(Exporter(np.zeros(3)))
    assert not dlpack._says_read_only(Exporter(torch.zeros(3)))


class OnGpu:
    """Memory of ``tensor`` by the CUDA array interface alone."""

    def __init__(self, tensor: torch.Tensor, **entries: Any) -> None:
        self.tensor = tensor
        self.entries = {
            "data": (tensor.data_ptr(), False),
            "shape": tuple(tensor.shape),
            "version": 3,
            **entries,
        }

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return self.entries


class Stream:
    """Stands in for torch's streams and notes who waits for whom."""

    waits: list[tuple[Any, Any]] = []

    def __init__(self, name: Any) -> None:
        self.name = name

    def wait_stream(self, other: Stream) -> None:
        self.waits.append((self.name, other.name))


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the CPU's memory were that of a GPU; streams are names."""
    monkeypatch.setattr(Stream, "waits", [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream("current"))
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device=None: Stream("default"))
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda pointer, device=None: Stream(pointer))
    monkeypatch.setattr(torch, "as_tensor", lambda array, device: array.tensor)


@pytest.mark.parametrize(
    "entries, waits",
    [
        ({}, []),
        ({"stream": None}, []),
        ({"stream": 1}, [("current", "default")]),
        ({"stream": 2}, [("current", 2)]),
        ({"stream": 4096}, [("current", 4096)]),
    ],
)
def test_the_stream_of_the_cuda_array_interface_is_waited_for(
    pretended_gpu: None, entries: dict[str, Any], waits: list[tuple[Any, Any]]
) -> None:
    residual = torch.zeros(3)
    selected = arrays.topk(torch.tensor([1.0, 3.0, 2.0]), 1, residual=OnGpu(residual, **entries))
    assert selected.indices.tolist() == [1] and residual.tolist() == [1.0, 0.0, 2.0]
    assert Stream.waits == waits


def test_what_the_cuda_array_interface_must_not_say(
    pretended_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    grad, residual = torch.ones(3), torch.zeros(3)
    read_only = OnGpu(residual, data=(residual.data_ptr(), True))
    with pytest.raises(ValueError, match="residual must be writeable"):
        arrays.topk(grad, 1, residual=read_only)
    assert dlpack.to_tensor("grad", read_only) is residual  # to be read
    with pytest.raises(ValueError, match="residual: stream 0"):
        arrays.topk(grad, 1, residual=OnGpu(residual, stream=0))
    # torch copies what is on another GPU: the copy has another address.
    monkeypatch.setattr(torch, "as_tensor", lambda array, device: array.tensor.clone())
    with pytest.raises(ValueError, match="residual is not on the current GPU, cuda:0"):
        arrays.topk(grad, 1, residual=OnGpu(residual, stream=4096))
    assert not residual.any() and not Stream.waits
    empty = OnGpu(torch.zeros(0), data=(4096, False))  # the address of nothing means nothing
    assert arrays.topk(torch.zeros(0), 0, residual=empty).values.numel() == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_memory_of_a_gpu_without_one() -> None:
    with pytest.raises(ValueError, match="residual is in GPU memory, and torch .* has no CUDA device here"):
        arrays.topk(torch.ones(3), 1, residual=OnGpu(torch.zeros(3)))


class CupyArray(Exporter):
    """As much of ``cupy.ndarray`` as is used here, on the CPU."""

    def __init__(self, array: Any, device: int = 1) -> None:
        super().__init__(array)
        self.device = types.SimpleNamespace(id=device)

    def view(self, dtype: str) -> CupyArray:
        return CupyArray(self.array.view(dtype))


CupyArray.__module__ = "cupy"


@pytest.mark.parametrize("pointer, expected", [(0, "default"), (1, "default"), (2, "default"), (4096, 4096)])
def test_cupys_stream_of_the_arrays_device(
    pretended_gpu: None, monkeypatch: pytest.MonkeyPatch, pointer: int, expected: Any
) -> None:
    """Whatever it is, results come back without a copy and without asking torch for an order it cannot give."""
    asked: list[Any] = []
    current: list[Any] = []

    def get_current_stream(device: int) -> Any:
        asked.append(device)
        return types.SimpleNamespace(ptr=pointer)

    @contextlib.contextmanager
    def stream(entered: Stream) -> Any:
        current.append(entered.name)
        yield

    def from_dlpack(exporter: Any) -> CupyArray:
        assert current == [expected]
        # CuPy passes its stream; -1, "no ordering", is what CPU tensors take as well.
        capsule = exporter.__dlpack__(stream=pointer or 1, max_version=(1, 0), copy=None)
        assert exporter.__dlpack_device__()[0] == 1
        return CupyArray(torch.from_dlpack(capsule).numpy())

    cupy = types.ModuleType("cupy")
    cupy.cuda = types.SimpleNamespace(get_current_stream=get_current_stream)  # type: ignore[attr-defined]
    cupy.from_dlpack = from_dlpack  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(torch.cuda, "stream", stream)

    ones = np.ones(2, dtype=np.float32), np.array([3, 5], dtype=np.int32)
    kept: list[torch.Tensor] = []
    merge = arrays.ops.merge_topk
    monkeypatch.setattr(arrays.ops, "merge_topk", lambda *inputs: kept.extend(merge(*inputs)) or kept)
    merged = arrays.merge(*map(CupyArray, ones), *map(CupyArray, ones), 1)
    assert asked == [1]
    assert merged.values.array.tolist() == [2.0] and merged.survives_a.array.tolist() == [True, False]
    assert merged.survives_a.array.dtype == np.bool_
    for part, tensor in zip(merged, kept):
        assert part.array.ctypes.data == tensor.data_ptr()
