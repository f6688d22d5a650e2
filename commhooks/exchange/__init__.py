"""Aggregators: they sum what the ranks send, pairs or whole vectors. Agreement on settings before data."""

from ..wire.message import Context
from .allgather import AllGather
from .base import Aggregated, Aggregator
from .dense import Dense
from .gtopk import GTopK
from .low_bit import LowBit
from .shared_indices import SharedIndices

__all__ = ["Aggregated", "Aggregator", "AllGather", "Context", "Dense", "GTopK", "LowBit", "SharedIndices"]
