"""The optimizers that the cases compare: Horovod's own, dense and with our compression, and ours."""

import itertools

import horovod.torch as hvd

from commhooks import ErrorFeedback, LowBit, SparseState
from commhooks.horovod import Compression, DistributedOptimizer
from commhooks.schemes import make_parts

SMALL_MB = 0.0005  # several buckets even for these small models
SCHEMES = ("randomk", "topk")  # of the stock optimizer
attempts = itertools.count()


def dense(**horovod):
    return lambda model, optimizer: hvd.DistributedOptimizer(
        optimizer, named_parameters=model.named_parameters(), **horovod
    )


def stock(scheme, density, made=None, options=None, fails=False, **horovod):
    """`fails`: names of its own, for operations that a failed step leaves under way are known by their names."""

    def make(model, optimizer):
        prefix = f"attempt{next(attempts)}." if fails else ""
        named = [(prefix + name, p) for name, p in model.named_parameters()]
        compression = getattr(Compression, scheme)(density, named, **(options or {}))
        if made is not None:
            made.append(compression)
        return hvd.DistributedOptimizer(optimizer, named_parameters=named, compression=compression, **horovod)

    return make


def scheme(name, density=0.1, memory=None):
    memory = memory or ErrorFeedback()
    options = {"dense_crossover": False, "timeout_s": 20.0}
    if name == "lossless":
        return SparseState(None, LowBit(32), memory, **options)
    name = {"tree": "gtopk-tree"}.get(name, name)
    return SparseState(*make_parts(name, density, seed=3, memory=memory), **options)


def ours(name, density=0.1, memory=None, **options):
    options.setdefault("bucket_cap_mb", SMALL_MB)

    def make(model, optimizer):
        state = scheme(name, density, memory)
        return DistributedOptimizer(optimizer, model.named_parameters(), state=state, **options)

    return make
