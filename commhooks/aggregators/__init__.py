"""Aggregators: how selections become one sum."""

from .allgather import AllGather
from .base import Aggregated, Aggregator, Context
from .dense import Dense
from .gtopk import GTopK
from .shared_indices import SharedIndices

__all__ = ["Aggregated", "Aggregator", "AllGather", "Context", "Dense", "GTopK", "SharedIndices"]
