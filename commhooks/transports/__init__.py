"""Transports: MPI, torch.distributed, and P ranks as threads of one process."""

from . import own_group  # noqa: F401  (registers what must run last at exit)
from .base import DEFAULT_TIMEOUT_S, Counters, Message, Transport
from .connection import NAMES, OVER_TORCH, Connection, check_name, make

__all__ = [
    "DEFAULT_TIMEOUT_S",
    "NAMES",
    "OVER_TORCH",
    "Connection",
    "Counters",
    "Message",
    "Transport",
    "check_name",
    "make",
]
