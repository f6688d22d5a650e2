"""Pairs are selected straight into a message: outputs that the caller gives."""

from __future__ import annotations

from typing import Any, Callable

import kernel_cases as cases
import pytest
import torch
from torch import Tensor

from commhooks.native import ops
from commhooks.native.fused import PAD, Fused, Selected

HEADER = 4
N, K = 5003, 60


def message(k: int) -> tuple[Tensor, Tensor, Tensor]:
    """An int32 message, and its places for values and indices."""
    whole = torch.full((HEADER + 2 * k + 1,), -7, dtype=torch.int32)
    return whole, whole[HEADER : HEADER + k].view(torch.float32), whole[HEADER + k : -1]


Select = Callable[..., Selected]
SELECTIONS: dict[str, Select] = {
    "select_topk": lambda fused, **out: ops.select_topk(fused, K, seed=3, **out),
    "select_threshold": lambda fused, **out: ops.select_threshold(fused, 0.5, K, start=70, **out),
}


@pytest.fixture(params=["library", "reference"], autouse=True)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "reference":
        monkeypatch.setattr(ops, "_implementation", lambda device: ops.reference)


@pytest.mark.parametrize("name", SELECTIONS)
def test_pairs_go_where_they_are_wanted(name: str) -> None:
    for kind in ("gaussian", "sparse", "zero"):
        fused = cases.fused(kind, N, 1, velocity=True, segments=5)
        mine, theirs = cases.copy(fused), cases.copy(fused)
        whole, values, indices = message(K)
        got = SELECTIONS[name](mine, values=values, indices=indices)
        cases.same_selection(got, mine, SELECTIONS[name](theirs), theirs)
        assert got.values is values and got.indices is indices
        assert whole[:HEADER].tolist() == [-7] * HEADER and whole[-1] == -7
        assert int((indices == PAD).sum()) == K - int(got.report[0])
    only = torch.empty(K)
    assert SELECTIONS[name](cases.copy(fused), values=only).values is only


def test_values_at_given_indices() -> None:
    fused = cases.fused("gaussian", N, 1, segments=5)
    mine, theirs = cases.copy(fused), cases.copy(fused)
    _, wanted = cases.sparse(N, K, K - 7, torch.Generator().manual_seed(1), whole=False)
    whole, values, _ = message(K)
    got = ops.select_indices(mine, wanted, values=values)
    cases.same_selection(got, mine, ops.select_indices(theirs, wanted), theirs)
    assert got.values is values and torch.equal(got.indices, wanted)
    assert got.indices.data_ptr() != wanted.data_ptr() and whole[:HEADER].tolist() == [-7] * HEADER


def test_outputs_are_checked_first() -> None:
    room = torch.zeros(3 * N)
    fused = Fused(room[:N], room[N : 2 * N], scale_tensor=torch.ones(1), segments=torch.tensor([0, N]))
    whole = torch.zeros(2 * K, dtype=torch.int32)
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"values": torch.zeros(K - 1)}, ValueError, f"values must have {K} elements, got {K - 1}"),
        ({"values": torch.zeros(2 * K)[::2]}, ValueError, "values must be a contiguous 1-D"),
        ({"values": torch.zeros(K, dtype=torch.float64)}, TypeError, "values must have dtype torch.float32"),
        ({"values": torch.zeros(K, device="meta")}, ValueError, "values must be on cpu, got meta"),
        ({"indices": torch.zeros(K)}, TypeError, "indices must have dtype torch.int32"),
        ({"values": room[N - 1 : N - 1 + K]}, ValueError, "grad and values must not share memory"),
        ({"values": room[2 * N - 1 :][:K]}, ValueError, "residual and values must not share memory"),
        (
            {"values": whole[:K].view(torch.float32), "indices": whole[K - 1 : -1]},
            ValueError,
            "indices and values must not share memory",
        ),
    ]
    for out, error, text in wrong:
        for select in SELECTIONS.values():
            with pytest.raises(error, match=text):
                select(fused, **out)
    wanted = whole[:K].copy_(torch.arange(K))
    with pytest.raises(ValueError, match="indices and values must not share memory"):
        ops.select_indices(fused, wanted, values=wanted.view(torch.float32))
    with pytest.raises(ValueError, match=f"values must have {K} elements"):
        ops.select_indices(fused, wanted, values=torch.zeros(K + 1))
    assert not room.any()
