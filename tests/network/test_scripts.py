"""The commands beside `scripts/bench network`: arguments, the refusal without root, pictures of hand-made results."""

import os

import pytest
from benchmarks import command
from benchmarks.network import accuracy, overlap

STUDIES = ("accuracy", "auto", "fit", "overlap")
each_study = pytest.mark.parametrize("study", STUDIES)


def start(*arguments):
    return command.main([str(argument) for argument in arguments])


@each_study
def test_refuses_without_root(study, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    out = tmp_path / "out.jsonl"
    assert start(study, "--allow-reference", "--json", out) == 2
    said = capsys.readouterr().err
    assert "need root" in said or "missing" in said or "Linux" in said
    assert not out.exists()


@each_study
def test_says_what_is_wrong_with_its_arguments(study, capsys):
    with pytest.raises(SystemExit) as stop:
        start(study)
    assert stop.value.code == 2 and "--json" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        start(study, "--help")
    assert stop.value.code == 0 and "--json" in capsys.readouterr().out


@pytest.mark.parametrize(
    "study, option",
    (
        ("accuracy", "--network"),
        ("accuracy", "--jobs"),
        ("auto", "--models"),
        ("fit", "--networks"),
        ("overlap", "--network"),
    ),
)
def test_unknown_choices(study, option, capsys, tmp_path):
    with pytest.raises(SystemExit):
        start(study, "--json", tmp_path / "out.jsonl", option, "nothing")
    assert "'nothing'" in capsys.readouterr().err


def test_every_command_is_listed(capsys):
    with pytest.raises(SystemExit) as stop:
        start("--help")
    said = capsys.readouterr().out
    assert stop.value.code == 0 and all(name in said for name in command.COMMANDS)


def test_accuracy_is_drawn(tmp_path):
    points = [(0.1 * i, 5 * i, 3.0 / i) for i in range(1, 20)]
    results = [
        {"job": job, "scheme": scheme, "density": 0.01, "network": "100mbit", "points": points}
        for job in ("resnet20", "lstm")
        for scheme in accuracy.SCHEMES
    ]
    accuracy.plot(results, tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").stat().st_size > 1000


def test_seconds_to_a_loss():
    points = [(0.5 * i, 5 * i, loss) for i, loss in enumerate((4.0, 2.0, 2.0, 0.0), 1)]
    assert accuracy.smooth([4.0, 2.0, 2.0, 0.0], over=1) == [4.0, 3.0, 2.0, 1.0]
    record = {"points": points}
    assert accuracy.seconds_to(record, 3.0) == 1.0 and accuracy.seconds_to(record, 2.5) == 2.0
    assert accuracy.seconds_to(record, 1.0) is None
    assert accuracy.step_s(record) == pytest.approx(0.1)


def test_overlap_is_drawn(tmp_path):
    trace = [
        ("backward", 0.0, 50.0),
        ("select", 50.0, 51.0),
        ("exchange", 51.0, 70.0),
        ("write_back", 70.0, 71.0),
    ]
    records = [{"way": "trace", "trace": trace}]
    seconds = {
        "none": 1.0,
        "overlapped": 1.1,
        "after": 1.4,
        "clipped by bucket": 1.12,
        "clipped by model": 1.3,
    }
    assert list(seconds) == list(overlap.WAYS)
    records += [{"way": way, "seconds": [s]} for way, s in seconds.items()]
    overlap.plot(records, tmp_path / "overlap.png")
    assert (tmp_path / "overlap.png").stat().st_size > 1000
    assert overlap.exposed_s(records, "after") == pytest.approx(0.4)
    assert "overlapped 100.0 ms (ratio 0.25)" in overlap.table(records)
    assert "clipped by model 300.0 ms (ratio 0.75)" in overlap.table(records)
