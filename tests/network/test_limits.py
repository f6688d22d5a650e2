"""The checks of the test network: limits hold at both ends of a link, traffic crosses, and a limit that is not there is noticed."""

import subprocess

import pytest
from benchmarks.harness.limits import LimitError, transfer, verify
from benchmarks.harness.namespaces import Network


@pytest.mark.network
def test_limit_holds_and_traffic_crosses():
    with Network(3, 100) as network:
        for found in verify(network, tolerance=0.4):  # the machine may be busy; the upper side stays strict
            assert found.interface_bytes >= found.payload_bytes
        network.set_rate(20)
        assert all(t.mbit_per_s < 21 for t in transfer(network, megabytes=0.5))
        network.set_rate(None)
        assert all(t.mbit_per_s > 21 for t in transfer(network, megabytes=5))
        assert network.command(0, ["true"])[:3] == ["ip", "netns", "exec"]


@pytest.mark.network
def test_a_wrong_limit_is_noticed():
    with Network(2, 100) as network:
        network.rate_mbit = 20  # claims less than tc lets through
        with pytest.raises(LimitError, match="Mbit/s at a limit of 20"):
            verify(network)


@pytest.mark.network
@pytest.mark.parametrize(
    "hosts, message", ((3, "together: .* at a limit of 20"), (2, "has no limit where 20"))
)
@pytest.mark.parametrize("end", (0, 1), ids=("what a host sends", "what it receives"))
def test_a_missing_limit_at_one_end_is_noticed(hosts, message, end):
    """The other end of each link still holds every single flow back."""
    with Network(hosts, 20) as network:
        namespace, device = network.ends(0)[end]
        command = f"ip netns exec {namespace} tc qdisc del dev {device} root"
        subprocess.run(command.split(), check=True)
        with pytest.raises(LimitError, match=message):
            verify(network, tolerance=0.9)


@pytest.mark.network
def test_a_transfer_that_takes_too_long():
    with Network(2, 1) as network, pytest.raises(LimitError, match="transfer at host"):
        transfer(network, megabytes=10, timeout_s=1.0)
