"""A small network on one machine: hosts as network namespaces on one bridge, every link limited both ways.

    with Network(hosts=4, rate_mbit=100) as network:
        subprocess.run(network.command(0, ["ping", "-c1", network.address(1)]))

Every host has `eth0` (MTU 9000, address 10.77.0.1 and up) whose other end is a port of the bridge, which
lives in a namespace of its own; `tc tbf` limits both ends, so what a host sends and what it receives
(`limits.verify` checks it). Nothing outside these namespaces is touched. They go when the block is left, also
by an exception, Ctrl-C, SIGTERM or SIGHUP; a run that was killed by SIGKILL is swept up by the next one
(names carry the process id).

A token bucket lets `burst` bytes pass at once after a pause, so short messages look faster than the rate: by
1.6 ms at 100 Mbit/s with the default, by 0.8 ms with `burst_bytes=10_000`, the least that works with MTU
9000. Congestion control is reno in each namespace. 10 Gbit/s is nominal: the CPU is the limit. All hosts
share this machine's cores.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any, Iterator, Sequence

PREFIX = "chbench"
MTU = 9000
NETWORKS = {"10mbit": 10.0, "100mbit": 100.0, "1gbit": 1000.0, "10gbit": 10_000.0}
_BURST_BYTES = {10.0: 10_000, 100.0: 20_000, 1000.0: 65_536, 10_000.0: 1_310_720}
_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class NetworkUnavailable(RuntimeError):
    """This machine or user cannot make such a network; the message says what is missing."""


def why_not() -> str | None:
    """None where a network can be made, otherwise the reason."""
    if sys.platform != "linux":
        return f"network namespaces need Linux, this is {sys.platform}"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"`{tool}` is missing (package iproute2)"
    if os.geteuid() != 0:
        return "network namespaces and tc need root: run this as root, in a container or a virtual machine"
    probe = f"{PREFIX}-{os.getpid()}-probe"
    inside = f"ip netns exec {probe}"
    try:
        for command in (
            f"ip netns add {probe}",
            f"{inside} ip link add br0 type bridge",
            f"{inside} ip link add eth0 type veth peer name port0",
            f"{inside} tc qdisc add dev eth0 root tbf rate 1mbit burst 20000 latency 50ms",
        ):
            made = _try(command.split())
            if made.returncode:
                return (
                    f"`{command}` failed: {made.stderr.strip()} "
                    "(a container needs CAP_SYS_ADMIN and CAP_NET_ADMIN, the kernel veth, bridge and sch_tbf)"
                )
    finally:
        _try(["ip", "netns", "delete", probe])
    return None


class Network:
    """`hosts` namespaces on one bridge; a context manager.

    Args:
        hosts: how many, 2 to 200.
        rate_mbit: limit of every link in each direction; None: no limit.
        burst_bytes: bucket of `tc tbf`; None: a default for the rate. At least one frame (9014 bytes).
        latency_ms: the longest a frame waits in the limiter's queue before frames are dropped.

    Raises:
        ValueError: an argument out of range.
        NetworkUnavailable: on entering, where it cannot be made.
    """

    def __init__(
        self, hosts: int, rate_mbit: float | None, *, burst_bytes: int | None = None, latency_ms: float = 50.0
    ) -> None:
        if not 2 <= hosts <= 200:
            raise ValueError(f"hosts must be in [2, 200], got {hosts}")
        if rate_mbit is not None and not rate_mbit > 0:
            raise ValueError(f"rate_mbit must be positive, got {rate_mbit}")
        if burst_bytes is not None and burst_bytes < MTU + 14:
            raise ValueError(f"burst_bytes must hold a frame of {MTU + 14} bytes, got {burst_bytes}")
        self.hosts, self.rate_mbit, self.latency_ms = hosts, rate_mbit, latency_ms
        self.burst_bytes = burst_bytes
        self._stem = f"{PREFIX}-{os.getpid()}-{id(self) & 0xFFFF:04x}"
        self._made: list[str] = []
        self._old_handlers: dict[int, Any] = {}

    def __enter__(self) -> Network:
        reason = why_not()
        if reason is not None:
            raise NetworkUnavailable(reason)
        sweep()
        self._catch_signals()
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def name(self, host: int) -> str:
        """The namespace of `host`."""
        return f"{self._stem}-h{host}"

    @property
    def host_prefix(self) -> str:
        """Namespace names without the host's number, for launchers that append a rank."""
        return f"{self._stem}-h"

    def address(self, host: int) -> str:
        """IPv4 address of `host`."""
        return f"10.77.0.{host + 1}"

    def command(self, host: int, command: Sequence[str]) -> list[str]:
        """`command` as run on `host`."""
        return ["ip", "netns", "exec", self.name(host), *command]

    def sent_bytes(self, host: int) -> int:
        """Bytes that `host`'s interface has sent."""
        path = "/sys/class/net/eth0/statistics/tx_bytes"
        return int(_run(self.command(host, ["cat", path])).stdout)

    def set_rate(self, rate_mbit: float | None, burst_bytes: int | None = None) -> None:
        """Changes the limit of every link, both ways; counters and connections stay."""
        self.rate_mbit, self.burst_bytes = rate_mbit, burst_bytes
        for host in range(self.hosts):
            self._limit(host)

    def ends(self, host: int) -> tuple[tuple[str, str], tuple[str, str]]:
        """(namespace, device) of both ends of `host`'s link: what it sends passes the first one."""
        return (self.name(host), "eth0"), (self._bridge, f"port{host}")

    def close(self) -> None:
        """Ends what still runs in the namespaces and deletes them; twice is fine."""
        with _signals_blocked():
            for name in reversed(self._made):
                _delete(name)
            self._made.clear()
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        self._old_handlers.clear()

    @property
    def _bridge(self) -> str:
        return f"{self._stem}-sw"

    def _make(self) -> None:
        self._add_namespace(self._bridge)
        _in(self._bridge, "ip link add br0 type bridge stp_state 0 forward_delay 0")
        _in(self._bridge, f"ip link set br0 mtu {MTU} up")
        for host in range(self.hosts):
            name, port = self.name(host), f"port{host}"
            self._add_namespace(name)
            _run(
                f"ip link add eth0 netns {name} mtu {MTU} type veth peer name {port} "
                f"netns {self._bridge}".split()
            )
            _in(self._bridge, f"ip link set {port} mtu {MTU} master br0 up")
            _in(name, f"ip address add {self.address(host)}/24 dev eth0")
            _in(name, "ip link set lo up")
            _in(name, "ip link set eth0 up")
            _in(name, "sysctl -qw net.ipv4.tcp_congestion_control=reno")
            self._limit(host)

    def _add_namespace(self, name: str) -> None:
        with _signals_blocked():  # so that a made namespace is always in the list
            _run(["ip", "netns", "add", name])
            self._made.append(name)
        _in(
            name,
            "sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1",
            check=False,
        )

    def _limit(self, host: int) -> None:
        for namespace, device in self.ends(host):
            if self.rate_mbit is None:
                _in(namespace, f"tc qdisc del dev {device} root", check=False)
                continue
            burst = (
                self.burst_bytes or _BURST_BYTES.get(self.rate_mbit) or max(20_000, int(self.rate_mbit * 128))
            )
            rate = f"rate {self.rate_mbit:g}mbit burst {burst} latency {self.latency_ms:g}ms"
            _in(namespace, f"tc qdisc replace dev {device} root tbf {rate}")

    def _catch_signals(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._old_handlers[number] = signal.signal(number, _leave)


def sweep() -> list[str]:
    """Deletes namespaces of earlier runs whose process is gone; returns their names."""
    listed = _try(["ip", "netns", "list"]).stdout.split("\n")
    stale = []
    for name in (line.split()[0] for line in listed if line.strip()):
        match = re.match(rf"{PREFIX}-(\d+)-", name)
        if match and not Path(f"/proc/{match[1]}").exists():
            _delete(name)
            stale.append(name)
    return stale


def _delete(name: str) -> None:
    """Deletes one of our namespaces; what still runs inside it was started by us and is ended."""
    for pid in _try(["ip", "netns", "pids", name]).stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    _try(["ip", "netns", "delete", name])


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Signals that arrive in the block are delivered after it."""
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, *_SIGNALS})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


def _in(namespace: str, command: str, check: bool = True) -> None:
    arguments = ["ip", "netns", "exec", namespace, *command.split()]
    (_run if check else _try)(arguments)


def _try(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=30)


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    done = _try(command)
    if done.returncode:
        raise NetworkUnavailable(
            f"`{' '.join(command)}` failed: {done.stderr.strip() or done.stdout.strip()}"
        )
    return done
