"""How the benchmarks attach a scheme to a model."""

import pytest
import torch
from benchmarks.network import step
from benchmarks.network.models import StandIn, equal_layers
from benchmarks.network.schemes import PLAIN, SCHEMES, attach
from benchmarks.network.step import decided
from launch import spawn_gloo


def model(rank):
    return StandIn(equal_layers(3, 64), seed=rank)


def test_every_scheme_over_gloo_takes_a_step():
    def step_each(rank, size):
        for scheme in (*SCHEMES, PLAIN):
            if scheme.endswith("-mpi"):
                continue
            attached = attach(scheme, model(rank), 0.1)
            attached.model(torch.zeros((), requires_grad=True)).backward()
            if attached.state is not None:
                # What auto leaves to DDP counts nothing; plain is timed as that.
                assert (attached.state.stats()["averaged_by"] == "ddp") == (
                    scheme == PLAIN
                ) or scheme == "auto"
                attached.state.close()

    spawn_gloo(step_each, 2)


def test_auto_gets_the_buckets_that_it_chose():
    def attached(rank, size):
        own, given = attach("auto", model(rank), 0.1), attach("auto", model(rank), 0.1, bucket_mb=3.0)
        plan = decided(own.state.plan)
        assert own.model.bucket_bytes_cap == int(plan["bucket_mb"] * 2**20)
        assert given.model.bucket_bytes_cap == 3 * 2**20
        return plan

    first, second = spawn_gloo(attached, 2)
    assert first == second
    assert f"{first['scheme']} at {first['density']:g}" in first["promised_s"]
    assert first["reason"] and all(seconds >= 0 for seconds in first["promised_s"].values())


def test_steps_that_ddp_averages_have_no_phases(monkeypatch):
    monkeypatch.setattr(step, "interface_bytes", lambda: 0)  # loopback has no eth0
    monkeypatch.setitem(step.MODELS, "small", lambda: equal_layers(3, 64))

    def timed(rank, size):
        return step.time_steps(step.Case(PLAIN, "small", steps=3), rank)

    for found in spawn_gloo(timed, 2):
        assert len(found.seconds) == 3 and min(found.seconds) > 0
        assert set(found.phases.values()) == {0.0} and found.counted_bytes == 0


def test_unknown_scheme():
    with pytest.raises(ValueError, match="'zip'"):
        attach("zip", model(0), 0.1)
