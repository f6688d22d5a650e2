"""`scripts/bench diloco`: our half of the comparison on loopback, its table, and the refusal without torchft."""

import math

import torch
from benchmarks import command
from benchmarks.network import diloco
from launch import spawn_gloo

CASE = {"library": diloco.OURS, "model": "gpt", "sync_every": 2, "steps": 4, "lr": 1e-3}


def test_our_half(monkeypatch):
    monkeypatch.setattr(diloco, "interface_bytes", lambda: 0)  # loopback has no eth0

    def measured(rank, size):
        record = next(diloco.measure(CASE, rank, size))
        in_float64 = diloco._trained(CASE, rank, size, torch.float64).parameters
        return record, [p.dtype for p in in_float64], sum(float(p.sum()) for p in in_float64)

    (record, dtypes, total), (other, _, other_total) = spawn_gloo(measured, 2)
    assert record["synchronisations"] == 1 and record["lines"] < diloco.lines(diloco.TORCHFT)
    assert record["loss"] == other["loss"] and 0 < record["loss"] < math.log(2000)
    assert set(dtypes) == {torch.float64} and total == other_total  # both hold the common model


def test_table():
    sync = {"sync_s": 0.25, "sync_bytes": 4e6, "synchronisations": 5, "lines": 2}
    shown = diloco.table(
        [
            CASE | {"library": diloco.BOTH, "difference": 3e-12, "steps": 30},
            CASE | sync | {"loss": 2.5},
            CASE | sync | {"model": "resnet50"},
        ]
    )
    lines = shown.strip().splitlines()
    assert lines[1].split() == ["commhooks", "gpt", "2", "250", "4.0", "2", "2.500"]
    assert lines[2].split() == ["commhooks", "resnet50", "2", "250", "4.0", "2", "-"]
    assert "3.0e-12 after 30 steps" in lines[3]


def test_torchft_is_missing(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(diloco, "find_spec", lambda name: None)
    out = tmp_path / "out.jsonl"
    assert command.main(["diloco", "--allow-reference", "--json", str(out)]) == 2
    assert "pip install torchft" in capsys.readouterr().err and not out.exists()
