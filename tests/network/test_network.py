"""`scripts/bench network` as a whole: what fails is told and the rest is kept. Needs no network."""

import json
from types import SimpleNamespace

import pytest
from benchmarks import network
from benchmarks.network_launch import JobError
from benchmarks.network_limits import LimitError
from benchmarks.network_records import KEYS
from no_network import NoNetwork

PLAN = {"scheme": "gtopk", "density": 0.01, "bucket_mb": 100.0, "reason": "it is faster", "promised_s": {}}
FIGURES = {"seconds": [0.1] * 3, "phases": {}, "counted_bytes": 0.0, "interface_bytes": 1000.0, "plan": None}


def run_job(network, program, cases, timeout_s):
    return [case | FIGURES for case in cases], None


def fail_limit(network):
    if network.rate_mbit == 1000:
        raise LimitError("too fast")
    return [SimpleNamespace(mbit_per_s=98.0)]


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Runs it on two networks without one; returns (exit status, records)."""
    monkeypatch.setattr(network, "why_not", lambda: None)
    monkeypatch.setattr(network, "Network", NoNetwork)
    monkeypatch.setattr(network, "run_job", run_job)
    monkeypatch.setattr(network, "verify", fail_limit)
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    options = "--ranks 4 --networks 1gbit 100mbit --models resnet50 --no-exchange --schemes"

    def run(*schemes):
        arguments = [
            *options.split(),
            *(schemes or ("none", "dense")),
            "--json",
            str(out),
            "--plot",
            str(picture),
        ]
        try:
            status = network.main(arguments)
        finally:
            records = json.loads(out.read_text())
            assert picture.stat().st_size > 1000
        return status, records

    return run


def test_a_limit_that_fails_ends_its_network_only(bench, capsys):
    status, records = bench()
    assert status == 1
    assert {r["network"] for r in records} == {"100mbit"}
    assert {r["scheme"] for r in records} == {"none", "dense"}
    assert "failed: 4 hosts, 1gbit: too fast" in capsys.readouterr().err


def test_ranks_that_fail_leave_what_came_before(bench, monkeypatch, capsys):
    monkeypatch.setattr(network, "run_job", lambda *job: (run_job(*job)[0][:1], JobError("out of time")))
    status, records = bench()
    assert status == 1 and {r["scheme"] for r in records} == {"none"}
    assert "failed: out of time" in capsys.readouterr().err


def test_an_interrupted_run_leaves_what_it_has(bench, monkeypatch):
    def interrupted(found):
        if found.rate_mbit == 100:
            raise KeyboardInterrupt
        return [SimpleNamespace(mbit_per_s=960.0)]

    monkeypatch.setattr(network, "verify", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench()


def test_auto_says_what_it_chose(bench, monkeypatch, capsys):
    def decide(found, program, cases, timeout_s):
        none, auto = run_job(found, program, cases, timeout_s)[0]
        assert auto["scheme"] == "auto" and auto["bucket_mb"] is None  # it takes its own
        return [none, auto | {"plan": PLAN, "density": PLAN["density"]}], None

    monkeypatch.setattr(network, "run_job", decide)
    _, records = bench("none", "auto")
    said = "resnet50, 4 ranks, 100mbit: auto chose gtopk at density 0.01, bucket_cap_mb=100: it is faster"
    assert capsys.readouterr().out.count(said) == 1
    assert {r["density"] for r in records if r["scheme"] == "auto"} == {0.01}
    assert all(tuple(r) == KEYS for r in records)
