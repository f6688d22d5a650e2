"""Horovod: compression classes for its own optimizer, and a ``DistributedOptimizer`` on fused buckets.

Selectors, memory, aggregators, reducer and worker are the ones of the DDP hook; here is only what Horovod
differs in.
"""

from .api import is_supported
from .compression import Compression, SparseCompressor
from .optimizer import DistributedOptimizer

if is_supported():  # hvd.elastic's registry of handlers is not public; what is public works with any version
    from .elastic import register_handlers

    register_handlers()

__all__ = ["Compression", "DistributedOptimizer", "SparseCompressor"]
