"""Memories: what a rank withholds from the average until it is sent."""

from .base import Memory
from .error_feedback import ErrorFeedback
from .no_memory import NoMemory

__all__ = ["ErrorFeedback", "Memory", "NoMemory"]
