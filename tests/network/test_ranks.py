"""Ranks on the hosts of the test network: their traffic crosses it, or the benchmark says so."""

import pytest
from benchmarks import network_launch
from benchmarks.namespaces import Network
from benchmarks.network import run_job
from benchmarks.network_exchange import cases, records_of
from benchmarks.network_launch import NotCrossedError, check_crossed
from launch import spawn_gloo


@pytest.mark.network
@pytest.mark.mpi
def test_ranks_cross_the_network():
    """Two ranks by MPI and gloo, on two hosts: bytes on the interface are at least what our transports count."""
    with Network(2, 1000) as network:
        found, error = run_job(network, "network_exchange.py", cases(2, (2000,)), 100)
    assert error is None, error
    assert len(found) == 8
    for case in found:
        assert case["interface_bytes"] >= case["counted_bytes"] > 0
    records = records_of(found, 2, "1gbit")
    assert {r["scheme"] for r in records} == {c["scheme"] for c in found}
    assert all(set(r) == set(records[0]) for r in records)


@pytest.mark.network
@pytest.mark.mpi
@pytest.mark.parametrize(
    "program, case",
    (
        ("network_exchange.py", {"scheme": "gtopk-mpi", "k": 2000, "ranks": 2}),
        ("network_rank.py", {"scheme": "gtopk-mpi", "model": "resnet20", "density": 0.05, "steps": 3}),
    ),
)
def test_ranks_that_do_not_cross_are_an_error(program, case, monkeypatch):
    """Left to itself MPICH finds ranks of one machine in shared memory, whatever namespace they are in."""
    forced = network_launch.environment()
    for name in ("MPIR_CVAR_NOLOCAL", "MPIR_CVAR_CH4_NETMOD", "FI_PROVIDER", "FI_TCP_IFACE"):
        del forced[name]
    monkeypatch.setattr(network_launch, "environment", lambda: forced)
    with Network(2, 1000) as network:
        found, error = run_job(network, program, [case], 60)
    assert found == []
    assert "did not cross" in str(error) and "MPIR_CVAR_NOLOCAL=1" in str(error)


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
