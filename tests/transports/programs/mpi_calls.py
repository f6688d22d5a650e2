"""The transport's calls on many dtypes, and its refusals."""

import sys
import time

import torch
from mpi4py import MPI

from commhooks import PeerLostError, PeerTimeoutError
from commhooks.transports.mpi import MpiTransport

first, second = MpiTransport(timeout_s=60.0), MpiTransport(timeout_s=60.0)
rank, size = first.rank, first.world_size
assert size == MPI.COMM_WORLD.size
right, left = (rank + 1) % size, (rank - 1) % size
for dtype in (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
):
    mine = torch.tensor([rank, 1, 0]).to(dtype)
    received = torch.empty(3, dtype=dtype)
    first.exchange([(right, mine)], [(left, received)], tag=5, what="ring")
    assert torch.equal(received, torch.tensor([left, 1, 0]).to(dtype))
    rows = torch.empty((size, 3), dtype=dtype)
    first.all_gather(mine, rows, tag=5, what="gather")
    assert torch.equal(rows, torch.stack([torch.tensor([r, 1, 0]).to(dtype) for r in range(size)]))
total = torch.tensor([float(rank), 1.0])
first.all_reduce(total, tag=6, what="sum")
assert total.tolist() == [size * (size - 1) / 2, float(size)]
large = torch.arange(9000) + rank  # beyond the size from which 3 ranks sum in turns
first.all_reduce(large, tag=6, what="sum")
assert torch.equal(large, size * torch.arange(9000) + size * (size - 1) // 2)
for root in range(size):
    buffer = torch.tensor([rank])
    first.broadcast(buffer, root=root, tag=7, what="copy")
    assert buffer.item() == root
# Two transports have communicators of their own: the same tag does not cross.
a, b = torch.zeros(1), torch.zeros(1)
first.exchange([(right, torch.tensor([1.0]))], [], tag=1, what="")
second.exchange([(right, torch.tensor([2.0]))], [(left, b)], tag=1, what="")
first.exchange([], [(left, a)], tag=1, what="")
assert (a.item(), b.item()) == (1.0, 2.0)
before = first.counters.bytes_sent
first.exchange([(right, torch.zeros(10))], [(left, torch.zeros(10))], tag=2, what="")
assert first.counters.bytes_sent - before == 40
try:
    first.exchange([(right, torch.zeros(2, 3).t())], [], tag=2, what="")
    raise SystemExit("a transposed buffer was sent")
except ValueError as error:
    assert "contiguous" in str(error)
for refused in (-1, size):
    try:
        first.broadcast(torch.zeros(1), root=refused, tag=7, what="copy")
        raise SystemExit(f"root {refused} was taken")
    except ValueError as error:
        assert f"root must be a rank below {size}, got {refused}" in str(error)
try:  # MPI itself refuses to post it
    first.move([(size + 7, torch.zeros(1))], [], 2, "bucket 4")
    raise SystemExit("a message to nobody was sent")
except PeerLostError as error:
    assert f"rank {rank}, bucket 4: " in str(error)
# Two messages, each of which comes in time, are late together.
impatient, told = MpiTransport(timeout_s=1.0), None
for _ in range(2 * (rank == 1)):
    time.sleep(0.7)
    impatient.exchange([(0, torch.zeros(1))], [], tag=3, what="late")
if rank == 0 and size > 1:
    try:
        with impatient.one_deadline():
            for _ in range(2):
                impatient.exchange([], [(1, torch.zeros(1))], tag=3, what="waiting")
    except PeerTimeoutError as error:
        told = error  # its frames hold the buffer of the message that is still to come
    assert "no answer from rank 1 within 1 s" in str(told), told
first.barrier(tag=8, what="the late message has come")
first.close(), first.close(), second.close()
sys.stdout.write("calls well\n")
