"""Every scheme over gloo gives the bits, the memories and the bytes that P ranks as threads give."""

import pytest
import torch
from launch import spawn_gloo
from twins import assert_equals_in_process

from commhooks.transports.base import nbytes
from commhooks.transports.distributed import DistributedTransport


def compare(rank, size):
    transport = DistributedTransport(timeout_s=60.0)
    assert (transport.rank, transport.world_size) == (rank, size)
    assert_equals_in_process(transport)
    transport.close()
    return True


def sums_and_rows(rank, size):
    """Sums and rows of a small and a large buffer, with the bytes and messages counted and those that went point to point."""
    transport = DistributedTransport(timeout_s=60.0)
    sent = []
    exchange = transport.move

    def watched(sends, receives, tag, what):
        sent.extend(nbytes(b) for _, b in sends)
        exchange(sends, receives, tag, what)

    transport.move = watched
    found = []
    for numel in (8192, 8193):  # 32 kB, and one more
        buffer = torch.arange(numel, dtype=torch.float32) + rank
        rows = torch.empty(size, numel)
        transport.all_gather(buffer, rows, tag=1, what="rows")
        assert torch.equal(rows, torch.arange(numel) + torch.arange(size).unsqueeze(1))
        gathered = (list(sent), transport.counters.bytes_sent)
        sent.clear()
        transport.all_reduce(buffer, tag=2, what="sum")
        assert torch.equal(buffer, torch.arange(numel, dtype=torch.float32) * size + sum(range(size)))
        found.append((*gathered, list(sent), transport.counters.bytes_sent - gathered[1]))
        sent.clear()
        transport.counters.bytes_sent = 0
    transport.close()
    return found


@pytest.mark.parametrize("world_size", [4, 5])
def test_small_buffers_go_by_doubling_and_are_counted_so(world_size):
    n = 4 * 8192
    for small, large in spawn_gloo(sums_and_rows, world_size, timeout=60):
        if world_size == 4:
            assert small == ([n, 2 * n], 3 * n, [n, n], 2 * n)
            assert large == ([], 3 * (n + 4), [], 6 * (n + 4) // 4)
        else:
            assert small == ([], 4 * n, [], 8 * n // 5) and large == ([], 4 * (n + 4), [], 8 * (n + 4) // 5)


@pytest.mark.parametrize("world_size", [2, 3, 4, 5, 8])
def test_every_scheme_over_gloo_equals_in_process(world_size):
    assert spawn_gloo(compare, world_size, timeout=120) == [True] * world_size
