"""Horovod: compression classes for its own optimizer, and a ``DistributedOptimizer`` on fused buckets.

Selectors, memory, aggregators, the Reducer and the communication thread are those of the DDP hook. This
package holds only what is specific to Horovod.
"""

from .api import is_supported
from .compression import Compression, SparseCompressor
from .optimizer import DistributedOptimizer

if is_supported():  # hvd.elastic's registry of handlers is not public; Compression works with any version
    from .elastic import register_handlers

    register_handlers()

__all__ = ["Compression", "DistributedOptimizer", "SparseCompressor"]
