"""From figures to records and tables: exactly the promised keys, ratios against every baseline."""

import pytest
from benchmarks import network_auto, network_exchange
from benchmarks.network_models import MODELS, StandIn, equal_layers, numel
from benchmarks.network_records import KEYS, bound_s, plot, records_of, table

PHASES = {"select": 0.02, "exchange": 0.04, "write_back": 0.01}


def figures(scheme, seconds, counted=0.0, interface=1000.0):
    return {
        "scheme": scheme,
        "model": "resnet50",
        "density": 0.001,
        "seconds": [seconds] * 5,
        "phases": PHASES,
        "counted_bytes": counted,
        "interface_bytes": interface,
    }


CASES = [
    figures("none", 0.1),
    figures("dense", 10.0, interface=1.25e8),
    figures("powersgd1", 0.5, interface=1e6),
    figures("gtopk", 0.2, counted=4e5, interface=4.1e5),
]


def test_records():
    records = records_of(CASES, 4, "100mbit")
    assert all(tuple(r) == KEYS for r in records)
    by = {(r["scheme"], r["metric"], r["baseline"]): r for r in records}
    assert by["gtopk", "step", "dense"]["ratio"] == pytest.approx(0.02)
    assert by["gtopk", "step", "powersgd1"]["ratio"] == pytest.approx(0.4)
    assert by["gtopk", "step", "bound"]["ratio"] == pytest.approx(0.2 / (0.1 + 0.032))
    assert by["gtopk", "exchange", "bound"]["ratio"] == pytest.approx(0.04 / 0.032)
    assert by["dense", "step", "bound"]["ratio"] == pytest.approx(10 / 10.1)
    assert by["gtopk", "interface_bytes", "dense"]["value"] == 4.1e5
    assert by["gtopk", "counted_bytes", "dense"]["value"] == 4e5
    assert ("dense", "select", "none") not in by and by["dense", "step", "none"]["density"] == 1.0
    assert by["gtopk", "step", "none"]["numel"] == 25_557_032


def test_bound():
    assert bound_s(CASES[0], 0.1, "1gbit") == 0.1
    assert bound_s(CASES[3], 0.1, "1gbit") == pytest.approx(0.1032)


def test_table_and_plot(tmp_path):
    records = records_of(CASES, 4, "100mbit")
    lines = table(records).splitlines()
    assert len([line for line in lines if line.startswith("gtopk")]) == 1
    assert "50.00" in next(line for line in lines if line.startswith("gtopk"))
    plot(records, tmp_path / "steps.png")
    assert (tmp_path / "steps.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "name, millions", (("resnet20", 0.27), ("vgg16", 14.7), ("resnet50", 25.56), ("lstm1500", 66.0))
)
def test_parameter_counts(name, millions):
    assert numel(MODELS[name]()) / 1e6 == pytest.approx(millions, rel=0.01)


def test_stand_in_fills_gradients():
    import torch

    model = StandIn(equal_layers(3, 8), seed=1)
    model(torch.zeros((), requires_grad=True)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_exchange_records():
    found = [
        {"scheme": "topk", "k": 1000, "seconds": [0.004, 0.002, 0.003], "counted_bytes": 25_000.0},
        {"scheme": "gtopk", "k": 1000, "seconds": [0.006] * 3, "counted_bytes": 16_000.0},
        {"scheme": "gtopk-mpi", "k": 1000, "seconds": [0.005] * 3, "counted_bytes": 16_000.0},
    ]
    records = network_exchange.records_of(found, 4, "100mbit")
    assert all(tuple(r) == KEYS for r in records)
    ratios = {(r["scheme"], r["baseline"]): r["ratio"] for r in records}
    assert ratios["topk", "bound"] == pytest.approx(0.003 / 0.002)
    assert ratios["gtopk", "topk"] == pytest.approx(2.0)
    assert set(ratios) == {("topk", "bound"), ("gtopk", "bound"), ("gtopk", "topk"), ("gtopk-mpi", "bound")}
    assert "gtopk-mpi" in network_exchange.table(records)


def test_auto_records_hold_its_plans():
    plans = [{"scheme": "gtopk", "density": 0.01}, {"scheme": "dense", "density": 1.0}]
    turns = zip((0.02, 0.04), (0.03, 0.05), (0.022, 0.022), plans, strict=True)
    found = []
    for dense, auto, plain, plan in turns:
        found.append({"scheme": "dense", "seconds": [dense] * 2, "plan": None})
        found.append({"scheme": "auto", "seconds": [auto] * 2, "plan": plan})
        found.append({"scheme": "plain", "seconds": [plain] * 2, "plan": None})
    auto, plain = network_auto.records_of(found, "resnet20", 2)
    assert tuple(auto) == tuple(plain) == (*KEYS, "plans")
    assert auto["ratio"] == pytest.approx(0.04 / 0.03) and plain["ratio"] == pytest.approx(0.022 / 0.03)
    assert (auto["plans"], plain["plans"]) == (plans, [])
