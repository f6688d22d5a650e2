"""Every scheme at P = 1 to 5 on sub-communicators of one job, compared bit for bit with in_process."""

import sys
from pathlib import Path

import torch
from mpi4py import MPI

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "unit"))
from ranks import SCHEMES, integers, memory_of, reducer  # noqa: E402

from commhooks import Bucket, ErrorFeedback  # noqa: E402
from commhooks.transports import in_process  # noqa: E402
from commhooks.transports.mpi import MpiTransport  # noqa: E402

N, STEPS = 90, 3


def gradient(rank, step, bucket):
    generator = torch.Generator().manual_seed(100 * step + 10 * bucket + rank)
    return integers(generator, N, unit=1024.0)


def train(transport, scheme):
    red = reducer(scheme, transport, 0.1, ErrorFeedback(0.5))
    outputs = []
    for step in range(STEPS):
        for bucket in range(2):
            g = gradient(transport.rank, step, bucket)
            if (transport.rank, step, bucket) == (0, 1, 1):
                g[3] = float("inf")
            red.reduce(Bucket(bucket, g, (f"p{bucket}",), (N,), bucket == 1))
            outputs.append(g)
    residual, velocity = memory_of(red, ["p0", "p1"])
    stats = red.stats()
    return [*outputs, residual, velocity], (stats["bytes_sent"], stats["bytes_received"])


world = MPI.COMM_WORLD
for size in range(1, 6):
    comm = world.Split(0 if world.rank < size else MPI.UNDEFINED, world.rank)
    if comm == MPI.COMM_NULL:
        continue
    transport = MpiTransport(comm, timeout_s=60.0)
    assert (transport.rank, transport.world_size) == (world.rank, size)
    for scheme in SCHEMES:
        ours, traffic = train(transport, scheme)
        theirs, expected_traffic = in_process.run(size, lambda t, scheme=scheme: train(t, scheme))[world.rank]
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a.view(torch.int32), b.view(torch.int32)) or bool(
                a.isnan().all() and b.isnan().all()
            )
        assert traffic == expected_traffic, (scheme, traffic, expected_traffic)
    transport.close()
    sys.stdout.write(f"equal P={size} rank={world.rank}\n")
    sys.stdout.flush()
