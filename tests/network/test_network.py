"""`scripts/bench network` as a whole: what fails is told and the rest is kept. Needs no network."""

from types import SimpleNamespace

import pytest
from benchmarks import command
from benchmarks.harness import study
from benchmarks.harness.launch import JobError
from benchmarks.harness.limits import LimitError
from benchmarks.harness.records import load, measured
from no_network import NoNetwork

PLAN = {"scheme": "gtopk", "density": 0.01, "bucket_mb": 100.0, "reason": "it is faster", "promised_s": {}}
LABELS = ("scheme", "model", "density")


def run_job(network, measurement, cases, timeout_s):
    figures = {"numel": 25_557_032, "step_s": 0.1, "steps": 3, "interface_bytes": 1000.0}
    return [{name: case[name] for name in LABELS} | figures for case in cases], None


def fail_limit(network):
    if network.rate_mbit == 1000:
        raise LimitError("too fast")
    return [SimpleNamespace(mbit_per_s=98.0)]


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Runs it on two networks without one; returns (exit status, records)."""
    monkeypatch.setattr(study, "why_not", lambda: None)
    monkeypatch.setattr(study, "Network", NoNetwork)
    monkeypatch.setattr(study, "run_job", run_job)
    monkeypatch.setattr(study, "verify", fail_limit)
    out, picture = tmp_path / "out.jsonl", tmp_path / "out.png"
    options = "network --allow-reference --ranks 4 --networks 1gbit 100mbit --models resnet50 --no-exchange --schemes"

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
            status = command.main(arguments)
        finally:
            records = measured(load(out))
            assert picture.stat().st_size > 1000
        return status, records

    return run


def test_a_limit_that_fails_ends_its_network_only(bench, capsys):
    status, records = bench()
    assert status == 1
    assert {r["network"] for r in records} == {"100mbit"}
    assert {r["scheme"] for r in records} == {"none", "dense"}
    said = capsys.readouterr()
    assert "failed: 4 hosts, 1gbit: too fast" in said.err
    assert "4 hosts, 100mbit: 98 to 98 Mbit/s measured" in said.out


def test_ranks_that_fail_leave_what_came_before(bench, monkeypatch, capsys):
    monkeypatch.setattr(study, "run_job", lambda *job: (run_job(*job)[0][:1], JobError("out of time")))
    status, records = bench()
    assert status == 1 and {r["scheme"] for r in records} == {"none"}
    assert "failed: out of time" in capsys.readouterr().err


def test_an_interrupted_run_leaves_what_it_has(bench, monkeypatch):
    def interrupted(found):
        if found.rate_mbit == 100:
            raise KeyboardInterrupt
        return [SimpleNamespace(mbit_per_s=960.0)]

    monkeypatch.setattr(study, "verify", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench()


def test_auto_says_what_it_chose(bench, monkeypatch, capsys):
    def decide(found, measurement, cases, timeout_s):
        assert measurement == "step"
        assert cases[1]["scheme"] == "auto" and cases[1]["bucket_mb"] is None  # it takes its own
        none, auto = run_job(found, measurement, cases, timeout_s)[0]
        return [none, auto | {"plan": PLAN, "density": PLAN["density"]}], None

    monkeypatch.setattr(study, "run_job", decide)
    _, records = bench("none", "auto")
    said = "resnet50, 4 ranks, 100mbit: auto chose gtopk at density 0.01, bucket_cap_mb=100: it is faster"
    assert capsys.readouterr().out.count(said) == 1
    assert {r["density"] for r in records if r["scheme"] == "auto"} == {0.01}
    assert {r["bench"] for r in records} == {"step"}
