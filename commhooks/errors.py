"""The exceptions that commhooks raises at run time, and what its other errors and warnings share.

Bad arguments raise ``ValueError`` or ``TypeError``. The message for an unknown keyword argument says what to
write instead.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

_PACKAGE = __name__.split(".")[0]
_MEMORY = ("momentum", "weight_decay", "rescale_with_lr", "clip_norm", "norm_over")
_REPLACEMENTS: dict[str, str] = {
    **{name: f"memory=ErrorFeedback({name}={{value!r}})" for name in _MEMORY},
    "nesterov": "memory=ErrorFeedback(momentum=0.9, nesterov={value!r})",
    "factor_masking": "memory=ErrorFeedback(momentum=0.9, factor_masking={value!r})",
    "error_feedback": "memory=ErrorFeedback(), or memory=NoMemory() to send without it",
    "ratio": "density={value!r}",
    "compress_ratio": "density={value!r}",
    "sparsity": "density=0.01, the share of a gradient that is sent",
    "k": "density=0.01, the share of a gradient that is sent",
    "warmup_steps": "density=ExponentialWarmup(0.01, warmup_steps={value!r})",
    "timeout": "timeout_s={value!r}",
    "group": "process_group={value}",
    "backend": "transport={value!r}",
    "clip": "memory=ErrorFeedback(clip_norm={value!r})",
    "beta": "momentum={value!r}",
    "H": "period={value!r}",
    "K": "period={value!r}",
    "frequency": "period={value!r}",
    "period": "sync_every={value!r}",
    "warmup": "warmup_steps={value!r}",
    "wd": "weight_decay={value!r}",
}
"""Unknown argument: what to write instead.

An entry is used only when the called function has the argument with which the replacement begins.
"""


class CommHooksError(RuntimeError):
    """Base of every run-time error of commhooks."""


class PeerTimeoutError(CommHooksError):
    """A peer did not answer within the timeout. The message names this rank, the peer and the bucket."""


class PeerLostError(CommHooksError):
    """The connection to a peer broke, most likely because its process died."""


class SettingsMismatchError(CommHooksError, ValueError):
    """Ranks disagree on settings or bucket sizes. The message shows both values and their ranks."""


class NonFiniteGradientError(CommHooksError):
    """A gradient holds NaN or Inf and the policy is ``"error"``."""


def says_what_to_write(function: F) -> F:
    """Makes unknown keyword arguments of ``function`` a ``TypeError`` that says what to write.

    The message names the argument and its value. The check runs before the function does. A classmethod that
    passes ``**options`` on to its class's constructor is checked against the constructor's arguments too.
    """

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        known = _keywords(function, arguments) if options else None
        unknown = [] if known is None else [name for name in options if name not in known]
        if known is not None and unknown:
            constructs = function.__name__ == "__init__" and arguments
            named = type(arguments[0]).__qualname__ if constructs else function.__qualname__
            raise TypeError(_refusal(f"{named}()", unknown[0], options[unknown[0]], known))
        return function(*arguments, **options)

    return call  # type: ignore[return-value]


def callers_level() -> int:
    """The ``stacklevel`` with which a warning of the calling function names a line outside commhooks."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] == _PACKAGE:
        frame, level = frame.f_back, level + 1
    return level


def _keywords(function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[str] | None:
    """The names that a call accepts as keyword arguments; None when it accepts any name."""
    names, collects = _parameters(function)
    if not collects:
        return names
    if not arguments or not isinstance(arguments[0], type):
        return None
    more, collects = _parameters(arguments[0].__init__, with_default=True)  # type: ignore[misc]
    return None if collects else names + more


@functools.cache
def _parameters(function: Callable[..., Any], with_default: bool = False) -> tuple[list[str], bool]:
    """The names ``function`` takes by keyword, and whether it takes any other name too.

    ``**options`` annotated by ``Unpack[...]`` takes the names of that ``TypedDict``. ``with_default`` leaves
    out the names that have no default.
    """
    parameters = inspect.signature(function).parameters.values()
    names = [
        p.name
        for p in parameters
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        and p.name not in ("self", "cls")
        and not (with_default and p.default is p.empty)
    ]
    collected = [p for p in parameters if p.kind is p.VAR_KEYWORD]
    if collected and str(collected[0].annotation).startswith("Unpack["):
        options = inspect.unwrap(function).__globals__[str(collected[0].annotation)[len("Unpack[") : -1]]
        return [*names, *options.__annotations__], False
    return names, bool(collected)


def _refusal(call: str, name: str, value: Any, known: Sequence[str]) -> str:
    replacement = _REPLACEMENTS.get(name, "")
    if replacement.split("=")[0] in known:
        return f"{call} has no argument {name!r}: write {replacement.format(value=value)}"
    import difflib

    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"{call} has no argument {name!r}: did you mean {near[0]}={value!r}?"
    return f"{call} has no argument {name!r} (got {value!r}); it has {', '.join(known)}"


def environment_choice(name: str, choices: Sequence[str], default: str) -> str:
    """Returns the value of the environment variable ``name``, or ``default`` where it is unset or empty.

    Raises:
        ValueError: the value is none of ``choices``. The message names the variable and its value.
    """
    value = os.environ.get(name, "")
    if value and value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return value or default
