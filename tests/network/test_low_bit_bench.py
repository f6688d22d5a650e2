"""scripts/bench lowbit: its jobs, what it measures, its check, and its page."""

import argparse

import pytest
from benchmarks.network import exchange, low_bit, step, training
from benchmarks.network.models import equal_layers
from benchmarks.pages import slow_links
from launch import spawn_gloo
from training import gpt

from commhooks import LowBit
from commhooks.transports import make


def test_every_number_of_bits_on_every_network_and_the_steps_at_one():
    jobs = low_bit.jobs(argparse.Namespace(networks=["100mbit", "1gbit"], steps=4, training=["10mbit"]))
    assert [(job.measurement, job.network) for job in jobs] == [
        ("low_bit", "100mbit"),
        ("low_bit", "1gbit"),
        ("step", "1gbit"),
        ("training", "10mbit"),
    ]
    assert all([case["bits"] for case in job.cases] == list(low_bit.BITS) for job in jobs[:2])
    assert [(case["scheme"], case["steps"]) for case in jobs[2].cases] == [
        (scheme, 4) for scheme in low_bit.SCHEMES
    ]
    assert jobs[3].cases == [{"method": method} for method in training.METHODS]


def test_an_exchange_counts_its_bytes(monkeypatch):
    monkeypatch.setattr(low_bit, "NUMEL", 20_000)
    monkeypatch.setattr(exchange, "interface_bytes", lambda: 0)  # loopback has no eth0
    monkeypatch.setattr(exchange, "check_crossed", lambda *arguments: None)

    def measured(rank, size):
        return [record for bits in low_bit.BITS for record in low_bit.measure({"bits": bits}, rank, size)]

    for found in spawn_gloo(measured, 2):
        assert [r["bits"] for r in found] == list(low_bit.BITS)
        for r in found:
            assert r["exchange_s"] > 0
            # half of the codes to their owner, and the mean of the other half back; a scale for 256 elements
            assert r["counted_bytes"] == pytest.approx(20_000 * (r["bits"] / 8 + 1 / 128), rel=0.06)


def test_an_exchange_that_loses_something_is_not_measured():
    class Forgetful(LowBit):
        def mean(self, transport, values, *others):
            out = super().mean(transport, values, *others)
            values.zero_()
            return out

    def checked(rank, size):
        transport = make("distributed", timeout_s=30.0)
        low_bit.check_conserves(LowBit(2), transport)
        with pytest.raises(RuntimeError, match="2 bits lose "):
            low_bit.check_conserves(Forgetful(2), transport)

    spawn_gloo(checked, 3)


def test_a_step_in_few_bits_has_phases(monkeypatch):
    monkeypatch.setattr(step, "interface_bytes", lambda: 0)
    monkeypatch.setattr(step, "check_crossed", lambda *arguments: None)
    monkeypatch.setitem(step.MODELS, "small", lambda: equal_layers(3, 64))

    def timed(rank, size):
        return list(step.measure(step.Case(low_bit.LOW_BIT, "small", 1.0, 3).as_json(), rank, size))

    for (found,) in spawn_gloo(timed, 2):
        assert found["counted_bytes"] < found["numel"] * 4 / 6 and found["exchange_s"] > 0


def test_training_steps_are_timed_in_whole_blocks(monkeypatch):
    monkeypatch.setattr(training, "interface_bytes", lambda: 0)
    monkeypatch.setitem(gpt.SIZES, "gpt", (1, 32, 2))

    def timed(rank, size):
        return [
            r for name in training.METHODS for r in training.measure({"method": name, "steps": 3}, rank, size)
        ]

    for found in spawn_gloo(timed, 2, timeout=120):
        assert {r["method"]: r["steps"] for r in found} == {
            name: 3 if method.block == 1 else 2 * method.block for name, method in training.METHODS.items()
        }
        assert all(r["step_s"] > 0 for r in found)


def record(bits, network, seconds):
    return {
        "bench": "low_bit",
        "ranks": 4,
        "network": network,
        "bits": bits,
        "numel": 25_557_032,
        "exchange_s": seconds,
        "counted_bytes": 5e6,
    }


def test_the_page_judges_the_times(monkeypatch):
    found = [record(1, "100mbit", 0.52), record(1, "1gbit", 0.04)]
    seconds = {"none": 0.1, "dense": 1.0, "fp16": 0.5, "lowbit": 0.25}
    for scheme, step_s in seconds.items():
        labels = {"bench": "step", "ranks": 4, "network": "1gbit", "model": "resnet50"}
        found.append({**labels, "scheme": scheme, "step_s": step_s})
    monkeypatch.setattr(slow_links, "load", lambda name: found)
    assert slow_links.exchanges()[2:] == [
        "| 1 | 100 Mbit/s | 5.0 | 520 | 1.30 |",
        "| 1 | 1 Gbit/s | 5.0 | 40 | 1.00 |",
    ]
    assert slow_links.steps()[-1] == "| ours, 4 bits | 250 | 4.0 | 2.0 |"
    assert [line.split(" | ")[-1] for line in slow_links.time_aims()[2:4]] == ["yes |", "no |"]
