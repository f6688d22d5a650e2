"""Aggregators: they sum the ranks' selections."""

from ..wire.message import Context
from .allgather import AllGather
from .base import Aggregated, Aggregator
from .dense import Dense
from .gtopk import GTopK
from .low_bit import LowBit
from .shared_indices import SharedIndices

__all__ = ["Aggregated", "Aggregator", "AllGather", "Context", "Dense", "GTopK", "LowBit", "SharedIndices"]
