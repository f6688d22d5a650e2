"""Several ranks' Reducers over in_process, fed with given gradients, step by step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from commhooks import (
    AllGather,
    Bucket,
    ErrorFeedback,
    GTopK,
    RandomK,
    Reducer,
    ThresholdTopK,
)
from commhooks.schemes import make_parts
from commhooks.transports import in_process

SCHEMES = {
    "union": lambda transport, density: make_parts("topk", density, transport)[:2],
    "gtopk": lambda transport, density: make_parts("gtopk", density, transport)[:2],
    "gtopk-tree": lambda transport, density: make_parts("gtopk-tree", density, transport)[:2],
    "shared": lambda transport, density: make_parts("randomk", density, transport, seed=7)[:2],
    "union-random": lambda transport, density: (RandomK(density, seed=7), AllGather(transport)),
    "dense": lambda transport, density: make_parts("dense", None, transport)[:2],
}
ALL_SCHEMES = {  # an estimated threshold depends on the sample: no oracle predicts it, every law holds all the same
    **SCHEMES,
    "threshold": lambda transport, density: make_parts("threshold", density, transport)[:2],
    "gtopk-threshold": lambda transport, density: (ThresholdTopK(density), GTopK(transport)),
}


BUCKETS = 4
NAMES = [f"p{i}" for i in range(BUCKETS)]


@dataclass
class Seen:
    """One rank after one step: its output, and copies of its memory (n,) in the order of the buffer."""

    output: Tensor
    residual: Tensor
    velocity: Tensor | None


def reducer(scheme, transport, density, memory=None, **options):
    """A Reducer of a named scheme that sums (no average) and never goes dense, unless told otherwise."""
    make = ALL_SCHEMES.get(scheme) or (lambda transport, density: make_parts(scheme, None, transport)[:2])
    selector, aggregator = make(transport, density)
    options = {"average": False, "dense_crossover": False, **options}
    return Reducer(selector, aggregator, memory or ErrorFeedback(), **options)


def memory_of(red, names):
    """The residual and velocity of the named parameters, flat."""
    state = red.memory.table.state_dict()
    residual = torch.cat([state["residual"][n] for n in names])
    velocity = torch.cat([state["velocity"][n] for n in names]) if state["velocity"] else None
    return residual, velocity


def run_steps(world_size, scheme, density, gradients, segments=None, memory=None, timeout_s=20.0, **options):
    """``gradients[step][rank]`` (n,) through one bucket a step; returns ``seen[step][rank]``.

    Args:
        segments: lengths of the parameters in the bucket.
        memory: called on each rank for its memory.
    """
    n = gradients[0][0].numel()
    segments = segments or (n,)
    names = [f"p{i}" for i in range(len(segments))]

    def work(transport):
        red = reducer(scheme, transport, density, memory() if memory else None, **options)
        seen = []
        for step in gradients:
            buffer = step[transport.rank].clone()
            red.reduce(Bucket(0, buffer, tuple(names), tuple(segments)))
            seen.append(Seen(buffer, *memory_of(red, names)))
        return seen

    return list(zip(*in_process.run(world_size, work, timeout_s), strict=True))


def step(red, gradients):
    """Reduces one gradient per bucket and returns the outputs."""
    buffers = [g.clone() for g in gradients]
    for i, buffer in enumerate(buffers):
        red.reduce(Bucket(i, buffer, (NAMES[i],), (buffer.numel(),), i == len(buffers) - 1))
    return buffers


def bits(tensor):
    """The tensor's bits, for comparisons that tell -0 from 0 and NaN from NaN."""
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def assert_same_bits(a, b):
    assert torch.equal(bits(a), bits(b)), f"{a} differs from {b}"


def integers(generator, n, low=-8, high=8, unit=1.0):
    """Integer multiples of ``unit`` in float32, (n,)."""
    return torch.randint(low, high + 1, (n,), generator=generator).float() * unit
