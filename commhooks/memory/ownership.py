"""The former name of :mod:`commhooks.memory.single_user`, for imports that have not followed it yet."""

from .single_user import claim

__all__ = ["claim"]
