"""One user for each memory and each reducer."""

from __future__ import annotations

import weakref
from typing import Any

_users: weakref.WeakKeyDictionary[Any, weakref.ref[Any]] = weakref.WeakKeyDictionary()


def claim(part: object, user: object, name: str, kind: str) -> None:
    """Makes ``user`` the only user of ``part``, a memory or a reducer.

    Two users would share what is withheld, and what one of them withheld would reach the other's model. A
    user that is forgotten leaves the part free.

    Args:
        part: what is used.
        user: it is not kept alive.
        name: of the argument that was given, for the error.
        kind: what users are called, for the error.

    Raises:
        ValueError: it has another user.
    """
    other = _users.get(part)
    if other is not None and other() not in (None, user):
        raise ValueError(f"{name} belongs to another {kind} already: give each its own, got {part!r}")
    _users[part] = weakref.ref(user)
