"""Transports: they move tensors between ranks over MPI or torch.distributed, or between threads."""

from . import own_group  # noqa: F401  (import registers its exit handler)
from .base import DEFAULT_TIMEOUT_S, Counters, Message, Transport, check_timeout
from .connection import NAMES, OVER_TORCH, Connection, check_name, default_timeout, make

__all__ = [
    "DEFAULT_TIMEOUT_S",
    "NAMES",
    "OVER_TORCH",
    "Connection",
    "Counters",
    "Message",
    "Transport",
    "check_name",
    "check_timeout",
    "default_timeout",
    "make",
]
