"""The fit of the cost model: known costs are found again, and a file is read as the machine that measured wrote it."""

import os

import pytest
from benchmarks import command
from benchmarks.harness import study
from benchmarks.harness.limits import LimitError
from benchmarks.harness.records import load, save
from benchmarks.network import fit
from no_network import NoNetwork

from commhooks.planner.cost_model import Costs

COSTS = {"message_s": 2e-4, "ring_step_s": 3e-4, "reduce_s": 2e-9, "merge_s": 8e-9}
CORES = 3


def synthetic_rows(suffix=""):
    """What exchanges would take if the model were exact."""
    costs = Costs(**COSTS, byte_s=8e-9, select_s=0.0, gather_s=0.0, write_s=0.0, bucket_s=0.0)
    rows = [
        {"bench": "exchange", "scheme": scheme + suffix, "pairs": k, "ranks": ranks, "network": network}
        for scheme in ("topk", "gtopk", "gtopk-tree", "randomk")
        for k in (1_000, 25_558, 100_000)
        for ranks in range(2, 9)
        for network in ("1gbit", "100mbit")
    ]
    return [row | {"exchange_s": fit.predict(costs, row, CORES)} for row in rows]


def file_of(*suffixes):
    """Records of a whole file."""
    rows = [row for suffix in suffixes for row in synthetic_rows(suffix)]
    return [{"bench": "machine", "cores": CORES, "load": 0.25}, *rows]


def run_script(*arguments):
    return command.main(["fit", "--allow-reference", *map(str, arguments)])


def test_known_costs_are_found_again():
    found = fit.fit(synthetic_rows(), CORES)
    assert {name: getattr(found, name) for name in COSTS} == pytest.approx(COSTS, rel=1e-6)


def test_a_file_is_fitted_alike_on_every_machine(tmp_path, monkeypatch, capsys):
    path = tmp_path / "fit.jsonl"
    save(file_of("", "-mpi"), path)
    written, first = path.read_text(), fit.report(load(path)) + "\n"
    for cores in (1, 64):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        assert run_script("--json", path, "--reuse") == 0
        assert capsys.readouterr().out == first
        assert path.read_text() == written
    found = fit.fits(load(path))
    assert {name: part.within / len(part.rows) for name, part in found.items()} == {"gloo": 1.0, "mpi": 1.0}
    costs = {name: getattr(found["mpi"].costs, name) for name in COSTS}
    assert costs == pytest.approx(COSTS, rel=1e-3)  # of figures with six digits


def test_the_published_file_says_its_cores():
    assert [r["cores"] for r in load("fit") if r["bench"] == "machine"] == [2]


def test_a_part_of_a_fit_has_the_errors_of_its_rows():
    rows = synthetic_rows()
    found = fit.Fit(fit.fit(rows, CORES), rows, [0.3 if row["ranks"] == 8 else -0.2 for row in rows])
    eight = found.only(ranks=8, network="1gbit")
    assert len(eight.rows) == 12 and eight.within == 0 and eight.worst == 0.3
    assert found.within == len(rows) - 24


def test_the_figure_is_drawn(tmp_path):
    path, picture = tmp_path / "fit.jsonl", tmp_path / "scaling.png"
    save(file_of(""), path)
    assert run_script("--json", path, "--reuse", "--plot", picture) == 0
    assert picture.stat().st_size > 1000


def test_a_network_whose_limit_does_not_hold_is_left_out(monkeypatch):
    def fail_limit(network):
        if network.rate_mbit == 1000:
            raise LimitError("too fast")
        return []

    monkeypatch.setattr(study, "Network", NoNetwork)
    monkeypatch.setattr(study, "verify", fail_limit)
    monkeypatch.setattr(study, "run_job", lambda *job: ([{"scheme": "topk", "exchange_s": 2.0}], None))
    jobs = [study.Job("exchange", 2, network, [], 1.0) for network in ("1gbit", "100mbit")]
    failed, link, rows = study.results(jobs)
    assert str(failed) == "2 hosts, 1gbit: too fast" and link[0]["bench"] == "link"
    assert rows == [
        {"bench": "exchange", "ranks": 2, "network": "100mbit", "scheme": "topk", "exchange_s": 2.0}
    ]
