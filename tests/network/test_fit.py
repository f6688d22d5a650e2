"""The fit of the cost model: known costs are found again, and a file is read as the machine that measured wrote it."""

import json
import os
import sys

import pytest
from benchmarks import network_fit
from benchmarks.network_limits import LimitError
from no_network import NoNetwork

from commhooks.planner.cost_model import Costs

COSTS = {"message_s": 2e-4, "ring_step_s": 3e-4, "reduce_s": 2e-9, "merge_s": 8e-9}
CORES = 3


def synthetic_rows(suffix=""):
    """What exchanges would take if the model were exact."""
    costs = Costs(**COSTS, byte_s=8e-9, select_s=0.0, gather_s=0.0, write_s=0.0, bucket_s=0.0)
    rows = [
        {"scheme": scheme + suffix, "k": k, "ranks": ranks, "network": network}
        for scheme in ("topk", "gtopk", "gtopk-tree", "randomk")
        for k in (1_000, 25_558, 100_000)
        for ranks in range(2, 9)
        for network in ("1gbit", "100mbit")
    ]
    return [row | {"seconds": network_fit.predict(costs, row, CORES)} for row in rows]


def run_script(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["network_fit.py", *map(str, arguments)])
    return network_fit.main()


def test_known_costs_are_found_again():
    found = network_fit.fit(synthetic_rows(), CORES)
    assert {name: getattr(found, name) for name in COSTS} == pytest.approx(COSTS, rel=1e-6)


def test_a_file_is_fitted_alike_on_every_machine(tmp_path, monkeypatch, capsys):
    path = tmp_path / "fit.json"
    written = network_fit.report(synthetic_rows() + synthetic_rows("-mpi"), CORES)
    first = capsys.readouterr().out
    path.write_text(json.dumps(written | {"cores": CORES, "load": 0.25}))
    for cores in (1, 64):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        assert run_script(monkeypatch, "--json", path, "--reuse") == 0
        assert capsys.readouterr().out == first
        assert json.loads(path.read_text()) == written | {"cores": CORES, "load": 0.25}
    assert written["within_25_percent"] == {"gloo": 1.0, "mpi": 1.0}
    assert written["costs"]["mpi"] == pytest.approx(COSTS, rel=1e-6)


def test_the_published_file_says_its_cores(request):
    found = json.loads((request.config.rootpath / "docs/performance/network-fit.json").read_text())
    assert found["cores"] == 2


def test_the_figure_is_drawn(tmp_path, monkeypatch):
    path, picture = tmp_path / "fit.json", tmp_path / "scaling.png"
    path.write_text(json.dumps({"rows": synthetic_rows(), "cores": CORES, "load": 0.0}))
    assert run_script(monkeypatch, "--json", path, "--reuse", "--plot", picture) == 0
    assert picture.stat().st_size > 1000


def test_a_network_whose_limit_does_not_hold_is_left_out(monkeypatch, capsys):
    def fail_limit(network):
        if network.rate_mbit == 1000:
            raise LimitError("too fast")

    monkeypatch.setattr(network_fit, "Network", NoNetwork)
    monkeypatch.setattr(network_fit, "verify", fail_limit)
    monkeypatch.setattr(
        network_fit, "run_job", lambda *job: ([{"scheme": "topk", "seconds": [3.0, 1.0, 2.0]}], None)
    )
    rows = network_fit.measure([2], ["1gbit", "100mbit"], [1000])
    assert rows == [{"scheme": "topk", "network": "100mbit", "seconds": 2.0}]
    assert "failed: 2 hosts, 1gbit: too fast" in capsys.readouterr().err
