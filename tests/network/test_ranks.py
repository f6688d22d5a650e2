"""Ranks on the hosts of the test network: their traffic crosses it, or the benchmark says so."""

import pytest
from benchmarks.harness import launch as harness
from benchmarks.harness.launch import run_job
from benchmarks.harness.namespaces import Network
from benchmarks.harness.ranks import NotCrossedError, check_crossed
from benchmarks.network.exchange import cases, over_bound
from launch import spawn_gloo


@pytest.mark.network
@pytest.mark.mpi
def test_ranks_cross_the_network():
    """Two ranks by MPI and gloo, on two hosts: bytes on the interface are at least what our transports count."""
    with Network(2, 1000) as network:
        found, error = run_job(network, "exchange", cases((2000,)), 100)
    assert error is None, error
    assert len(found) == 8
    for record in found:
        assert record["interface_bytes"] >= record["counted_bytes"] > 0
        assert record["exchange_s"] > 0 and over_bound(record | {"network": "1gbit"}) > 0
    assert {r["scheme"] for r in found} == {c["scheme"] for c in cases((2000,))}
    assert all(set(r) == set(found[0]) for r in found)


@pytest.mark.network
@pytest.mark.mpi
@pytest.mark.parametrize(
    "measurement, case",
    (
        ("exchange", {"scheme": "gtopk-mpi", "pairs": 2000}),
        ("step", {"scheme": "gtopk-mpi", "model": "resnet20", "density": 0.05, "steps": 3}),
    ),
)
def test_ranks_that_do_not_cross_are_an_error(measurement, case, monkeypatch):
    """Left to itself MPICH finds ranks of one machine in shared memory, whatever namespace they are in."""
    with Network(2, 1000) as network:
        forced = harness.environment(network)
        for name in ("MPIR_CVAR_NOLOCAL", "MPIR_CVAR_CH4_NETMOD", "FI_PROVIDER", "FI_TCP_IFACE"):
            del forced[name]
        monkeypatch.setattr(harness, "environment", lambda network: forced)
        found, error = run_job(network, measurement, [case], 60)
    assert found == []
    assert "did not cross" in str(error) and "MPIR_CVAR_NOLOCAL=1" in str(error)


@pytest.mark.mpi
def test_ranks_on_loopback():
    """No namespaces and no root: the rank program, its records and a measurement of the planner."""
    case = {"transport": "mpi", "model": "small", "turns": 1}
    found, error = run_job(harness.Loopback(2), "plan_check", [case], 100)
    assert error is None, error
    assert [(r["scheme"], r["density"]) for r in found] == [("dense", 1.0), ("topk", 0.01), ("topk", 0.001)]
    assert all(0 < r["least_s"] <= r["median_s"] and r["predicted_s"] > 0 for r in found)


def test_check_crossed():
    def check(rank, size):
        check_crossed(100.0, 100.0, "equal")
        check_crossed(100.0, 60.0 + 80.0 * rank, "uneven, as ranks of a library's own all-reduce are")
        try:
            check_crossed(100.0, 120.0 * rank, "gtopk")
        except NotCrossedError as error:
            return str(error)

    for message in spawn_gloo(check, 2):
        assert message.startswith("gtopk: the ranks counted 200 bytes, their interfaces sent 120")
    assert spawn_gloo(lambda rank, size: check_crossed(100.0, 0.0, "one rank sends nothing"), 1) == [None]
