"""Checks that the network of `namespaces.py` does what it should, by transfers between its hosts.

    with Network(hosts=4, rate_mbit=100) as network:
        verify(network)  # or LimitError

The sending and receiving program is `transfer.py`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from .launch import module_path
from .namespaces import Network

_PROGRAM = "benchmarks.harness.transfer"
_MOST = 1.05  # times the nominal rate: the token bucket gives some bytes away at first

Flow = tuple[int, int]
"""(sending host, receiving host)."""


class LimitError(RuntimeError):
    """The network is there but does not do what it should."""


@dataclass(frozen=True)
class Transfer:
    """One flow, as the application measured it. `interface_bytes`: of all its sender's flows together."""

    source: int
    destination: int
    payload_bytes: int
    interface_bytes: int
    began_s: float
    ended_s: float

    @property
    def mbit_per_s(self) -> float:
        """Payload rate in Mbit/s."""
        return self.payload_bytes * 8e-6 / (self.ended_s - self.began_s)


def ring(hosts: int) -> list[Flow]:
    """Every host sends to its right neighbour, so every link is busy both ways."""
    return [(host, (host + 1) % hosts) for host in range(hosts)]


def transfer(
    network: Network,
    flows: Sequence[Flow] | None = None,
    megabytes: float | None = None,
    timeout_s: float = 60.0,
) -> list[Transfer]:
    """Sends along all flows at the same time.

    Args:
        network: an entered network.
        flows: default: the ring.
        megabytes: payload of each flow; default: what takes about 0.5 s at the rate, at most 50.
        timeout_s: for the whole of it.

    Raises:
        LimitError: a transfer failed or took too long.
    """
    flows = ring(network.hosts) if flows is None else flows
    payload = int(1e6 * (megabytes or _half_a_second(network)))
    before = {source: network.sent_bytes(source) for source, _ in flows}
    lines = _run_programs(network, flows, payload, timeout_s)
    sent = {source: network.sent_bytes(source) - count for source, count in before.items()}
    return [Transfer(s, d, payload, sent[s], *lines[s, d]) for s, d in flows]


def verify(network: Network, tolerance: float = 0.15, attempts: int = 5) -> list[Transfer]:
    """Transfers and checks that the limits hold and that the bytes crossed the interfaces.

    Between neighbours the rate must lie at most 5 % above the nominal one (always) and, up to 1 Gbit/s,
    within `tolerance` below (in one of `attempts`: the machine may be busy); above 1 Gbit/s the CPU is the
    limit. There each flow passes two limits, its sender's and its receiver's, either of which would do. So
    with three hosts or more two also send to one (only the receiver's end can hold them back) and one to two
    (only the sender's), and with any number tc must say that both ends of every link are limited.

    Returns:
        The transfers between neighbours.

    Raises:
        LimitError: a limit does not hold.
    """
    transfers = _between_neighbours(network, tolerance, attempts)
    if network.rate_mbit is not None:
        if network.hosts > 2:
            _check_together(network, [(1, 0), (2, 0)])
            _check_together(network, [(0, 1), (0, 2)])
        _check_settings(network, network.rate_mbit)
    return transfers


def _between_neighbours(network: Network, tolerance: float, attempts: int) -> list[Transfer]:
    rate = network.rate_mbit
    for _ in range(attempts):
        transfers = transfer(network)
        slowest = min(transfers, key=lambda t: t.mbit_per_s)
        for t in transfers:
            if t.interface_bytes < t.payload_bytes:
                raise LimitError(
                    f"host {t.source} sent {t.payload_bytes} bytes, its interface {t.interface_bytes}"
                )
            if rate is not None and t.mbit_per_s > _MOST * rate:
                raise _off(t, rate)
        if rate is None or rate > 1000 or slowest.mbit_per_s >= (1 - tolerance) * rate:
            return transfers
    raise _off(slowest, rate)


def _off(t: Transfer, rate: float) -> LimitError:
    return LimitError(
        f"host {t.source} to {t.destination}: {t.mbit_per_s:.1f} Mbit/s at a limit of {rate:g} Mbit/s"
    )


def _check_together(network: Network, flows: Sequence[Flow]) -> None:
    """Flows that share one end of one link carry no more than its rate in all."""
    transfers = transfer(network, flows, _half_a_second(network) / len(flows))
    seconds = max(t.ended_s for t in transfers) - min(t.began_s for t in transfers)
    together = sum(t.payload_bytes for t in transfers) * 8e-6 / seconds
    if together > _MOST * (network.rate_mbit or float("inf")):
        named = " and ".join(f"{source} to {destination}" for source, destination in flows)
        raise LimitError(
            f"hosts {named} together: {together:.1f} Mbit/s at a limit of {network.rate_mbit:g} Mbit/s"
        )


def _check_settings(network: Network, rate: float) -> None:
    """Both ends of every link have a token bucket of this rate in Mbit/s."""
    for host in range(network.hosts):
        for namespace, device in network.ends(host):
            command = f"ip netns exec {namespace} tc -j qdisc show dev {device}".split()
            shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
            # tc tells bytes per second
            rates = [q["options"]["rate"] * 8e-6 for q in json.loads(shown) if q["kind"] == "tbf"]
            if not any(abs(found - rate) <= 0.01 * rate for found in rates):
                told = f"{rates[0]:g} Mbit/s" if rates else "no limit"
                raise LimitError(f"host {host}: {device} has {told} where {rate:g} Mbit/s should be")


def _half_a_second(network: Network) -> float:
    """Megabytes that take about 0.5 s at the rate, at most 50."""
    return min(50.0, (network.rate_mbit or 10_000.0) / 8 * 0.5)


def _run_programs(
    network: Network, flows: Sequence[Flow], payload: int, timeout_s: float
) -> dict[Flow, tuple[float, float]]:
    """When each flow began and ended, in seconds of one clock."""
    hosts = sorted({host for flow in flows for host in flow})
    at = {network.address(host): host for host in hosts}
    programs = {host: _start(network, host, flows, payload, timeout_s) for host in hosts}
    times = {}
    try:
        for host, program in programs.items():
            out, err = program.communicate(timeout=timeout_s)
            if program.returncode:
                raise LimitError(f"transfer at host {host} failed: {err.strip()[-400:]}")
            for address, began, ended in map(str.split, out.splitlines()):
                times[at[address], host] = float(began), float(ended)
    except subprocess.TimeoutExpired:
        raise LimitError(f"transfer at host {host} took more than {timeout_s:g} s") from None
    finally:
        for program in programs.values():
            if program.poll() is None:
                program.kill()
                program.wait()
    return times


def _start(
    network: Network, host: int, flows: Sequence[Flow], payload: int, timeout_s: float
) -> subprocess.Popen[str]:
    incoming = sum(destination == host for _, destination in flows)
    addresses = [network.address(destination) for source, destination in flows if source == host]
    program = [sys.executable, "-m", _PROGRAM, str(incoming), str(payload), str(timeout_s), *addresses]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(network.command(host, program), env=module_path(), text=True, **pipes)
