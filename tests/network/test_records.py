"""From records to ratios, tables and pictures."""

import pytest
import torch
from benchmarks.network import auto, exchange
from benchmarks.network.models import MODELS, StandIn, equal_layers, numel
from benchmarks.network.step import Timed, bound_s, over_bound, plot, starts, table, times_faster
from training.models import ResNet20

from commhooks.bench.models import ResNet50


def record(scheme, seconds, counted=None, interface=1000.0):
    ours = {"select_s": 0.02, "exchange_s": 0.04, "write_back_s": 0.01, "counted_bytes": counted}
    return {
        "bench": "step",
        "ranks": 4,
        "network": "100mbit",
        "scheme": scheme,
        "model": "resnet50",
        "step_s": seconds,
        "steps": 5,
        "interface_bytes": interface,
        **(ours if counted else {}),
    }


RECORDS = [
    record("none", 0.1),
    record("dense", 10.0, interface=1.25e8),
    record("powersgd1", 0.5, interface=1e6),
    record("gtopk", 0.2, counted=4e5, interface=4.1e5),
]


def test_ratios():
    (schemes,) = starts(RECORDS).values()
    gtopk, dense = schemes["gtopk"], schemes["dense"]
    assert times_faster(gtopk, schemes, "dense") == pytest.approx(50)
    assert times_faster(gtopk, schemes, "powersgd1") == pytest.approx(2.5)
    assert over_bound(gtopk, schemes) == pytest.approx(0.2 / (0.1 + 0.032))
    assert over_bound(dense, schemes) == pytest.approx(10 / 10.1)
    shown = table([gtopk]).splitlines()[-1].split()
    assert shown[7:11] == ["-"] * 4  # without the step without communication and without peers


def test_steps_of_other_starts_are_not_compared():
    other = [r | {"ranks": 8} for r in RECORDS[:2]]
    found = starts(RECORDS + other)
    assert set(found) == {("resnet50", 4, "100mbit"), ("resnet50", 8, "100mbit")}
    assert set(found["resnet50", 8, "100mbit"]) == {"none", "dense"}


def test_bound():
    assert bound_s(RECORDS[0] | {"network": "1gbit"}, 0.1) == 0.1
    assert bound_s(RECORDS[3] | {"network": "1gbit"}, 0.1) == pytest.approx(0.1032)


def test_table_and_plot(tmp_path):
    lines = table(RECORDS).splitlines()
    assert len([line for line in lines if line.startswith("gtopk")]) == 1
    shown = next(line for line in lines if line.startswith("gtopk")).split()
    # step, select, exchange, write back in ms, MB on the wire and counted, over bound, times faster, steps
    assert shown[1:] == ["200", "20", "40", "10.0", "0.41", "0.40", "1.52", "50", "-", "2.5", "5"]
    plot(RECORDS, tmp_path / "steps.png")
    assert (tmp_path / "steps.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "name, millions", (("resnet20", 0.27), ("vgg16", 14.7), ("resnet50", 25.56), ("lstm1500", 66.0))
)
def test_parameter_counts(name, millions):
    assert numel(MODELS[name]()) / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize("name, model", (("resnet20", ResNet20), ("resnet50", ResNet50)))
def test_a_stand_in_has_the_parameters_of_its_model(name, model):
    assert MODELS[name]() == [tuple(p.shape) for p in model().parameters()]


def test_stand_in_fills_gradients():
    model = StandIn(equal_layers(3, 8), seed=1)
    model(torch.zeros((), requires_grad=True)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_exchange_over_its_bound():
    shared = {"bench": "exchange", "ranks": 4, "network": "100mbit", "pairs": 1000}
    found = [
        shared | {"scheme": "topk", "exchange_s": 0.003, "counted_bytes": 25_000.0},
        shared | {"scheme": "gtopk-mpi", "exchange_s": 0.005, "counted_bytes": 16_000.0},
    ]
    assert exchange.over_bound(found[0]) == pytest.approx(0.003 / 0.002)
    lines = exchange.table(found).splitlines()
    assert lines[-1].split() == ["gtopk-mpi", "1,000", "4", "100mbit", "5.0", "3.9"]


def test_auto_records_hold_its_plans():
    plans = [{"scheme": "gtopk", "density": 0.01}, {"scheme": "dense", "density": 1.0}]
    seconds = {"dense": (0.02, 0.04), "auto": (0.03, 0.05), "plain": (0.022, 0.022)}
    turns = {
        scheme: [
            Timed([s] * 2, {}, 0.0, 0.0, plan if scheme == "auto" else None) for s, plan in zip(taken, plans)
        ]
        for scheme, taken in seconds.items()
    }
    found = [r | {"ranks": 2} for r in auto.records_of(turns, "resnet20")]
    assert [(r["scheme"], r["turns"], r["steps"]) for r in found] == [(s, 2, 4) for s in auto.SCHEMES]
    _, ours, plain = found
    assert auto.over_dense(ours, found) == pytest.approx(0.04 / 0.03)
    assert auto.over_dense(plain, found) == pytest.approx(0.022 / 0.03)
    assert ours["plans"] == plans and "plans" not in plain
