"""Bad arguments raise TypeError or ValueError with their name before anything is touched."""

from __future__ import annotations

from typing import Any, Callable

import numpy as np
import pytest
import torch

from commhooks.interop import arrays
from commhooks.native import ops
from commhooks.native.fused import PAD, Fused

N = 10


def operands(**changes: Any) -> Fused:
    fields: dict[str, Any] = {"grad": torch.ones(N), "residual": torch.zeros(N), **changes}
    return Fused(**fields)


def index(*places: int) -> torch.Tensor:
    return torch.tensor(places, dtype=torch.int32)


WRONG_OPERANDS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"grad": torch.ones(N, dtype=torch.float64)}, TypeError, "grad"),
    ({"grad": torch.ones(N, dtype=torch.int32)}, TypeError, "grad"),
    ({"grad": [1.0] * N}, TypeError, "grad"),
    ({"grad": torch.ones(N - 1)}, ValueError, "grad"),
    ({"grad": torch.ones(2 * N)[::2]}, ValueError, "grad"),
    ({"grad": torch.ones(1, N)}, ValueError, "grad"),
    ({"grad": torch.ones(N, device="meta")}, ValueError, "grad must be on cpu"),
    ({"grad": torch.ones(N, requires_grad=True)}, ValueError, "grad"),
    ({"residual": torch.zeros(N, dtype=torch.float16)}, TypeError, "residual"),
    ({"velocity": torch.zeros(N + 1)}, ValueError, "velocity"),
    ({"velocity": torch.zeros(N, dtype=torch.bfloat16)}, TypeError, "velocity"),
    ({"velocity": torch.zeros(N, device="meta")}, ValueError, "velocity must be on cpu"),
    ({"momentum": 0.9}, ValueError, "momentum"),
    ({"scale_tensor": torch.ones(2)}, ValueError, "scale_tensor"),
    ({"scale_tensor": torch.ones((), dtype=torch.float64)}, TypeError, "scale_tensor"),
    ({"scale_tensor": torch.ones((), device="meta")}, ValueError, "scale_tensor must be on cpu"),
    ({"segments": torch.tensor([0, 5, N], dtype=torch.int32)}, TypeError, "segments"),
    ({"segments": torch.tensor([0, 5, N], device="meta")}, ValueError, "segments must be on cpu"),
    ({"segments": torch.tensor([0])}, ValueError, "segments"),
    ({"segments": torch.tensor([0, 5, N + 1])}, ValueError, "segments"),
    ({"segments": torch.tensor([1, 5, N])}, ValueError, "segments"),
    ({"segments": torch.tensor([0, 7, 5, N])}, ValueError, "segments"),
]


@pytest.mark.parametrize("changes, error, name", WRONG_OPERANDS)
def test_wrong_operands(changes: dict[str, Any], error: type[Exception], name: str) -> None:
    fused = operands(**changes)
    calls: list[Callable[[], Any]] = [
        lambda: ops.select_topk(fused, 3),
        lambda: ops.select_threshold(fused, 0.5, 3),
        lambda: ops.select_indices(fused, index(1, 2)),
    ]
    for call in calls:
        with pytest.raises(error, match=name):
            call()
    if fused.residual.dtype == torch.float32:
        assert not fused.residual.any()


def test_shared_memory_is_refused() -> None:
    """Whatever is overwritten lies apart from all else that a kernel gets; neighbours are fine."""
    room, apart = torch.zeros(N + 4), torch.zeros(N)
    whole = room.view(torch.int32)
    offsets = torch.tensor([0, N])
    cases: list[tuple[Fused, str]] = [
        (Fused(room[:N], room[4:]), "grad and residual"),
        (Fused(room[:N], apart, velocity=room[4:], momentum=0.9), "grad and velocity"),
        (Fused(apart, room[:N], velocity=room[4:], momentum=0.9), "velocity and residual"),
        (Fused(apart, room[:N], velocity=room[:N], momentum=0.9), "velocity and residual"),
        (Fused(apart, room[:N], scale_tensor=room[3]), "scale_tensor and residual"),
        (
            Fused(torch.ones(4), offsets.view(torch.float32), segments=offsets),
            "segments and residual",
        ),
    ]
    for fused, names in cases:
        with pytest.raises(ValueError, match=names):
            ops.select_topk(fused, 3)
    with pytest.raises(ValueError, match="indices and residual must not share memory"):
        ops.select_indices(Fused(apart, room[:N]), whole[:2])
    with pytest.raises(ValueError, match="indices and velocity must not share memory"):
        ops.select_indices(Fused(apart, torch.zeros(N), room[:N], 0.9), whole[:2])
    ops.select_topk(Fused(room[:2], room[2:4], room[4:6], 0.9, scale_tensor=room[6]), 1)
    ops.scatter_add(room[:3], room[3:5], index(0, 1))
    for call, outputs in ((ops.write_back, "out"), (ops.scatter_add, "dense")):
        o = torch.arange(6, dtype=torch.float32)
        for values, indices, names in (
            (o[:2], index(0, 4), f"values and {outputs}"),
            (o[1:3], index(0, 4), f"values and {outputs}"),
            (torch.ones(2), o.view(torch.int32)[4:], f"indices and {outputs}"),
        ):
            with pytest.raises(ValueError, match=f"{names} must not share memory"):
                call(o, values, indices)
        assert o.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "call, error, name",
    [
        (lambda: ops.select_topk(operands(), N + 1), ValueError, "k must"),
        (lambda: ops.select_topk(operands(), -1), ValueError, "k must"),
        (lambda: ops.select_topk(operands(), 1.5), TypeError, "k must"),
        (lambda: ops.select_topk(operands(), True), TypeError, "k must"),
        (lambda: ops.select_topk(operands(), np.float32(1)), TypeError, "k must"),
        (lambda: ops.select_topk(operands(), 1, seed=0.5), TypeError, "seed must"),
        (lambda: ops.select_topk(operands(), 1, threads=0), ValueError, "threads"),
        (lambda: ops.select_topk(operands(), 1, threads=1.5), TypeError, "threads must"),
        (lambda: ops.select_topk(operands(), 1, threads=4097), ValueError, "threads must be at most 4096"),
        (lambda: ops.select_topk(operands(), 1, threads=2**32 + 1), ValueError, "threads must be at most"),
        (lambda: ops.select_threshold(operands(), 1.0, 1, threads=1.5), TypeError, "threads must"),
        (lambda: ops.select_threshold(operands(), 1.0, 1, start=1.5), TypeError, "start must"),
        (lambda: ops.select_indices(operands(), index(1), threads=1.5), TypeError, "threads must"),
        (
            lambda: ops.select_indices(operands(), index(1).to("meta")),
            ValueError,
            "indices must be on cpu",
        ),
        (lambda: ops.select_threshold(operands(), -1.0, 3), ValueError, "threshold"),
        (lambda: ops.select_threshold(operands(), float("nan"), 3), ValueError, "threshold"),
        (lambda: ops.select_threshold(operands(), 1.0, 3, start=N), ValueError, "start"),
        (lambda: ops.select_indices(operands(), index(2, 1)), ValueError, "indices"),
        (lambda: ops.select_indices(operands(), index(1, 1)), ValueError, "indices"),
        (lambda: ops.select_indices(operands(), index(-1, 1)), ValueError, "indices"),
        (lambda: ops.select_indices(operands(), index(1, N)), ValueError, "indices"),
        (lambda: ops.select_indices(operands(), index(1, PAD, 3)), ValueError, "indices"),
        (lambda: ops.select_indices(operands(), torch.tensor([1, 2])), TypeError, "indices"),
        (lambda: ops.random_indices(0, 0, 0, 2**31 - 1, 3), ValueError, "numel"),
        (lambda: ops.random_indices(0, 0, 0, 5.0, 3), TypeError, "numel must"),
        (lambda: ops.random_indices(0.5, 0, 0, 5, 3), TypeError, "seed must"),
        (lambda: ops.random_indices(0, 0, 0, 5, 6), ValueError, "k must"),
        (
            lambda: ops.merge_topk(torch.ones(2), index(2, 1), torch.ones(1), index(1), 3),
            ValueError,
            "indices_a",
        ),
        (
            lambda: ops.merge_topk(torch.ones(2), index(1, 2), torch.ones(2), index(1, 1), 3),
            ValueError,
            "indices_b",
        ),
        (
            lambda: ops.merge_topk(torch.ones(3), index(1, 2), torch.ones(1), index(1), 3),
            ValueError,
            "values_a",
        ),
        (
            lambda: ops.merge_topk(torch.ones(1), index(1), torch.ones(1, device="meta"), index(1), 1),
            ValueError,
            "values_b must be on cpu",
        ),
        (
            lambda: ops.merge_topk(torch.ones(1), index(1), torch.ones(1), index(1).to("meta"), 1),
            ValueError,
            "indices_b must be on cpu",
        ),
        (
            lambda: ops.merge_topk(torch.ones(1), index(1).to("meta"), torch.ones(1), index(1), 1),
            ValueError,
            "indices_a must be on cpu",
        ),
        (lambda: ops.merge_topk(torch.ones(1), index(1), torch.ones(1), index(1), -1), ValueError, "k must"),
        (
            lambda: ops.merge_topk(torch.ones(1), index(1), torch.ones(1), index(1), 1, threads=0),
            ValueError,
            "threads",
        ),
        (lambda: ops.contains(index(2, 1), index(1)), ValueError, "wanted"),
        (lambda: ops.contains(index(1), index(1, 1)), ValueError, "among"),
        (lambda: ops.contains(torch.tensor([1]), index(1)), TypeError, "wanted"),
        (lambda: ops.scatter_add(torch.ones(3), torch.ones(1), index(3)), ValueError, "indices"),
        (lambda: ops.scatter_add(torch.ones(3).half(), torch.ones(1), index(1)), TypeError, "dense"),
        (lambda: ops.write_back(torch.ones(3), torch.ones(1), index(3)), ValueError, "indices"),
        (lambda: ops.write_back(torch.ones(3), torch.ones(2, 1), index(1)), ValueError, "values and indices"),
        (
            lambda: ops.write_back(torch.ones(3), torch.ones(1, device="meta"), index(1)),
            ValueError,
            "values must be on cpu",
        ),
        (
            lambda: ops.write_back(torch.ones(3), torch.ones(1), index(1).to("meta")),
            ValueError,
            "indices must be on cpu",
        ),
        (
            lambda: ops.write_back(torch.ones(3), torch.ones(2, 2).t(), index(0, 1, 0, 1).reshape(2, 2)),
            ValueError,
            "values and indices must be contiguous",
        ),
        (
            lambda: ops.write_back(torch.ones(3), torch.ones(2, 2), index(0, 0, 1, 1).reshape(2, 2).t()),
            ValueError,
            "values and indices must be contiguous",
        ),
        (
            lambda: ops.scatter_add(torch.ones(3), torch.ones(1, device="meta"), index(1)),
            ValueError,
            "values must be on cpu",
        ),
        (
            lambda: ops.write_back(torch.ones(3).half(), torch.ones(2, 1), index(1, 2)[:, None]),
            ValueError,
            "one row",
        ),
        (lambda: arrays.topk([1.0], 1), TypeError, "grad must export"),
    ],
)
def test_wrong_arguments(call: Callable[[], Any], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=name):
        call()


def test_huge_tensors_are_refused() -> None:
    """2^31 - 1 is the index of padding; no memory is behind these tensors."""
    huge = torch.empty(2**31 - 1, device="meta")
    with pytest.raises(ValueError, match=r"grad must have fewer than 2\*\*31 - 1 elements, got 2147483647"):
        ops.select_topk(Fused(huge, huge), 1)
    with pytest.raises(ValueError, match=r"dense must have fewer than 2\*\*31 - 1 elements"):
        ops.scatter_add(huge, torch.ones(1, device="meta"), index(1).to("meta"))


def test_whatever_python_takes_for_an_integer() -> None:
    fused = operands(grad=torch.arange(N, dtype=torch.float32))
    got = ops.select_topk(fused, np.int64(2), seed=np.int32(7), threads=np.int16(1))
    assert got.indices.tolist() == [8, 9]
    assert ops.select_threshold(fused, 0.0, np.uint8(1), start=np.int64(3)).indices.tolist() == [3]
    ones = (torch.ones(2), index(1, 2))
    assert ops.merge_topk(*ones, *ones, np.int64(1)).indices.tolist() == [1]
    expected = ops.random_indices(1, 2, 3, 1000, 5)
    assert torch.equal(
        ops.random_indices(np.int64(1), np.int32(2), np.uint64(3), np.int64(1000), np.int8(5)), expected
    )


def test_a_gradient_of_two_dimensions_is_named() -> None:
    with pytest.raises(ValueError, match="grad must be a contiguous 1-D tensor"):
        arrays.topk(np.ones((2, 3), dtype=np.float32), 1)
