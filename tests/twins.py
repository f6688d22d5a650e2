"""A short training by Reducers over any transport, compared bit for bit with the same over in_process."""

from __future__ import annotations

import torch
from ranks import SCHEMES, integers, memory_of, reducer

from commhooks import Bucket, ErrorFeedback
from commhooks.transports import in_process

N, STEPS = 90, 3


def gradient(rank, step, bucket):
    """Integers times 1024, so sums are exact in any order; float32 (N,)."""
    generator = torch.Generator().manual_seed(100 * step + 10 * bucket + rank)
    return integers(generator, N, unit=1024.0)


def train(transport, scheme):
    """Two buckets a step, one Inf on rank 0; all outputs and this rank's memory, and the bytes of the last step."""
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


def assert_equals_in_process(transport):
    """Every scheme over ``transport``: this rank's bits and bytes are those of its twin among threads."""

    def twin(thread, scheme):
        # How an all-reduce is made, and so counted, is the transport's own matter.
        thread._all_reduce_traffic = transport._all_reduce_traffic
        return train(thread, scheme)

    for scheme in (*SCHEMES, "lowbit"):
        ours, traffic = train(transport, scheme)
        twins = in_process.run(transport.world_size, lambda t, scheme=scheme: twin(t, scheme))
        theirs, expected_traffic = twins[transport.rank]
        for a, b in zip(ours, theirs, strict=True):
            same_bits = torch.equal(a.view(torch.int32), b.view(torch.int32))
            assert same_bits or bool(a.isnan().all() and b.isnan().all()), scheme
        assert traffic == expected_traffic, (scheme, traffic, expected_traffic)
