"""Memories: they keep the part of the gradient that a rank has not sent yet."""

from .base import Memory
from .error_feedback import ErrorFeedback
from .no_memory import NoMemory

__all__ = ["ErrorFeedback", "Memory", "NoMemory"]
