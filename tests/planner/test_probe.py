"""Probing: what a network of known costs looks like to it, and that ranks stay in step."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch

import commhooks.planner.kernel_timing as device_module
from commhooks.planner import Costs, exchange_s, probe
from commhooks.planner.kernel_timing import SMALL_NUMEL, kernel_costs, small_bucket_s
from commhooks.transports import Transport, in_process

probe_module = import_module("commhooks.planner.probe")  # the package's attribute is the function
TRUE = Costs(1e-4, 8e-8, 3e-4, 2e-9, 0.0, 0.0, 0.0, 0.0, 0.0)  # 100 Mbit/s


class Clocked(Transport):
    """Rank 0 of 4 identical ranks over a network that charges what the cost model says, on a clock of its own."""

    name = "clocked"

    def __init__(self, costs, world_size=4, faster=1.0):
        super().__init__(0, world_size, 60.0)
        self.costs, self.faster, self.now, self.largest = costs, faster, 0.0, 0

    def perf_counter(self):
        return self.now

    def move(self, sends, receives, tag, what):
        self.now += self.costs.message_s + self.costs.byte_s * sum(b.nbytes for _, b in sends)

    def _all_gather(self, send, receive, tag, what):
        receive[:] = send

    def _all_reduce(self, buffer, tag, what):
        charged = replace(self.costs, byte_s=self.costs.byte_s / self.faster)
        self.now += exchange_s(charged, "dense", buffer.numel() - 1, 0, self.world_size)
        self.largest = max(self.largest, buffer.nbytes)


def test_a_dense_buckets_constant_is_not_above_a_sparse_ones(monkeypatch):
    """On a busy machine it was measured so, and the plan compressed for it."""
    transport = Clocked(TRUE)
    probed(monkeypatch, transport)
    monkeypatch.setattr(
        probe_module, "small_bucket_s", lambda transport, device, dense: 9.0 if dense else 2.0
    )
    found = probe(transport, 10**7)
    assert 1.9 < found.bucket_s <= 2.0 and found.dense_bucket_s == found.bucket_s


def probed(monkeypatch, transport, numel=10**7):
    monkeypatch.setattr(device_module, "time", transport)
    monkeypatch.setattr(probe_module, "kernel_costs", lambda *arguments: (0.0,) * 4 + (3.0, 5.0))
    monkeypatch.setattr(
        probe_module, "small_bucket_s", lambda transport, device, dense: 0.5 if dense else 2.0
    )
    return probe(transport, numel)


@pytest.mark.parametrize("world_size", (2, 4, 5))
@pytest.mark.parametrize("byte_s", (8e-7, 8e-8, 8e-9, 1e-10))
def test_costs_are_found(monkeypatch, world_size, byte_s):
    """Small all-reduces go another way (doubling), which must not be taken for a ring's steps."""
    true = replace(TRUE, byte_s=byte_s)
    found = probed(monkeypatch, Clocked(true, world_size))
    for name in ("message_s", "byte_s", "ring_step_s", "reduce_s"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=1e-3), name
    assert (found.encode_s, found.decode_s) == (3.0, 5.0)
    assert found.bucket_s == 2.0  # of which the all-gather took nothing here
    alone = exchange_s(true, "dense", SMALL_NUMEL, 0, world_size)
    assert found.dense_bucket_s == pytest.approx(max(0.0, 0.5 - alone))


def test_an_all_reduce_faster_than_the_link_tells_of_a_faster_link(monkeypatch):
    """Dense was predicted several times too slow where gloo's all-reduce outruns one exchange at a time."""
    true = replace(TRUE, byte_s=1e-9, reduce_s=0.0)
    found = probed(monkeypatch, Clocked(true, faster=3.0))
    assert found.byte_s == pytest.approx(true.byte_s / 3, rel=1e-3) and found.reduce_s < 1e-15
    n = 6_000_000
    fast = replace(true, byte_s=true.byte_s / 3)
    assert exchange_s(found, "dense", n, 0, 4) == pytest.approx(exchange_s(fast, "dense", n, 0, 4), rel=1e-3)


def test_the_all_reduce_grows_to_a_bucket_unless_it_takes_long(monkeypatch):
    for byte_s, numel, largest, seconds in (
        (1e-10, 10**7, 25 << 20, 0.5),
        (8e-9, 10**7, 7_000_000, 2.0),
        (8e-8, 10**7, 500_000, 2.0),
        (1e-10, 10**5, 410_000, 0.5),  # or to all of a small model
        (1e-10, 10, 110_000, 0.5),
    ):
        transport = Clocked(replace(TRUE, byte_s=byte_s))
        probed(monkeypatch, transport, numel)
        assert largest / 5 < transport.largest <= largest
        assert transport.now < seconds


def test_probe_gives_all_ranks_the_same():
    found = in_process.run(3, lambda t: probe(t, 10 ** (3 + t.rank)))
    assert found[0] == found[1] == found[2]
    assert found[0].select_s > 0 and found[0].message_s > 0
    assert found[0].bucket_s > 0 and found[0].dense_bucket_s > 0
    alone = probe(in_process.group(1)[0], 1000)
    assert alone.message_s == alone.byte_s == alone.ring_step_s == alone.reduce_s == 0
    assert alone.bucket_s > 1e-5
    with pytest.raises(ValueError, match="numel"):
        probe(in_process.group(1)[0], 0)


def test_a_small_bucket_goes_through_the_reducer():
    def traffic(transport, dense):
        before = transport.counters.bytes_sent
        seconds = small_bucket_s(transport, torch.device("cpu"), dense)
        return seconds, transport.counters.bytes_sent - before

    for sparse, dense in in_process.run(2, lambda t: (traffic(t, False), traffic(t, True))):
        assert sparse[0] > 0 and dense[0] > 0
        assert dense[1] - sparse[1] == 11 * (4 * (SMALL_NUMEL + 1) - (8 * 64 + 16))


def test_kernels_are_measured_on_what_no_cache_holds(monkeypatch):
    """A large model's buckets take turns; a small one's are what they are."""
    seen = []
    select = device_module.ops.select_topk
    monkeypatch.setattr(
        device_module.ops,
        "select_topk",
        lambda fused, k: seen.append((id(fused), fused.grad.numel())) or select(fused, k),
    )
    monkeypatch.setattr(device_module, "_BUCKET_NUMEL", 100_000)
    for numel, buckets, size in (
        (10**6, 3, 100_000),
        (150_000, 2, 100_000),
        (70_000, 1, 70_000),
        (5, 1, 1 << 16),
    ):
        seen.clear()
        assert all(cost > 0 for cost in kernel_costs(numel, torch.device("cpu"), 0))
        assert len(set(seen)) == buckets and {n for _, n in seen} == {size}
