"""Horovod: compression classes for its own optimizer, and a ``DistributedOptimizer`` on fused buckets.

Selectors, memory, aggregators, reducer and worker are the ones of the DDP hook; here is only what Horovod differs in.
"""

from .compression import Compression, SparseCompressor
from .elastic import register_handlers
from .optimizer import DistributedOptimizer

__all__ = ["Compression", "DistributedOptimizer", "SparseCompressor"]

register_handlers()
