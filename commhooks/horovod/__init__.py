"""Horovod: compression classes for its own optimizer, and a ``DistributedOptimizer`` on fused buckets.

Selectors, memory, aggregators, reducer and worker are the ones of the DDP hook; here is only what Horovod differs in.
"""

from .compression import Compression, SparseCompressor
from .optimizer import DistributedOptimizer

try:
    from .elastic import register_handlers
except (ImportError, AttributeError):  # another Horovod: what is public there still works
    pass
else:
    register_handlers()

__all__ = ["Compression", "DistributedOptimizer", "SparseCompressor"]
