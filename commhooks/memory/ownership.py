"""One owner for each part that keeps what a rank withheld."""

from __future__ import annotations

import weakref
from typing import Any

_owners: weakref.WeakKeyDictionary[Any, weakref.ref[Any]] = weakref.WeakKeyDictionary()


def claim(part: object, owner: object, name: str, kind: str) -> None:
    """Makes ``owner`` the only owner of ``part``, a memory or a reducer.

    Two owners would share what is withheld, and what one of them withheld would reach the other's model. An
    owner that is forgotten leaves the part free.

    Args:
        part: what is owned.
        owner: it is not kept alive.
        name: of the argument that was given, for the error.
        kind: what owners are called, for the error.

    Raises:
        ValueError: it is another owner's.
    """
    other = _owners.get(part)
    if other is not None and other() not in (None, owner):
        raise ValueError(f"{name} belongs to another {kind} already: give each its own, got {part!r}")
    _owners[part] = weakref.ref(owner)
