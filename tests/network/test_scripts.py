"""The scripts beside `scripts/bench network`: arguments, the refusal without root, pictures of hand-made results."""

import os
import sys

import pytest
from benchmarks import network_accuracy, network_auto, network_fit, network_overlap

SCRIPTS = (network_accuracy, network_auto, network_fit, network_overlap)
each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.__name__.rpartition(".")[2])


@pytest.fixture
def start(monkeypatch):
    """Runs a script's main() with these arguments."""

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
        return script.main()

    return run


@each_script
def test_refuses_without_root(script, start, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    out = tmp_path / "out.json"
    assert start(script, "--json", out) == 2
    said = capsys.readouterr().err
    assert "need root" in said or "missing" in said or "Linux" in said
    assert not out.exists()


@each_script
def test_says_what_is_wrong_with_its_arguments(script, start, capsys):
    with pytest.raises(SystemExit) as stop:
        start(script)
    assert stop.value.code == 2 and "--json" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        start(script, "--help")
    assert stop.value.code == 0 and "--json" in capsys.readouterr().out


@pytest.mark.parametrize(
    "script, option",
    (
        (network_accuracy, "--network"),
        (network_accuracy, "--jobs"),
        (network_auto, "--models"),
        (network_fit, "--networks"),
        (network_overlap, "--network"),
    ),
)
def test_unknown_choices(script, option, start, capsys, tmp_path):
    with pytest.raises(SystemExit):
        start(script, "--json", tmp_path / "out.json", option, "nothing")
    assert "'nothing'" in capsys.readouterr().err


def test_accuracy_is_drawn(tmp_path):
    points = [(0.1 * i, 5 * i, 3.0 / i) for i in range(1, 20)]
    results = [
        {"job": job, "scheme": scheme, "density": 0.01, "network": "100mbit", "points": points}
        for job in ("resnet20", "lstm")
        for scheme in network_accuracy.SCHEMES
    ]
    network_accuracy.plot(results, tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").stat().st_size > 1000


def test_overlap_is_drawn(tmp_path):
    trace = [
        ("backward", 0.0, 50.0),
        ("select", 50.0, 51.0),
        ("exchange", 51.0, 70.0),
        ("write_back", 70.0, 71.0),
    ]
    network_overlap.plot({"trace": trace}, tmp_path / "overlap.png")
    assert (tmp_path / "overlap.png").stat().st_size > 1000
