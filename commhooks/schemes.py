"""The table of schemes: which selector, exchange and memory a name stands for, and which of them fit."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from .errors import callers_level
from .exchange import Aggregator, AllGather, Dense, GTopK, LowBit, SharedIndices
from .memory import ErrorFeedback, Memory, NoMemory
from .selection.density import DensitySchedule
from .selection.selectors import RandomK, Selector, ThresholdTopK, TopK
from .transports import Transport

Parts = tuple[Selector | None, Aggregator, Memory]
"""Selector, aggregator and memory, in the order in which ``SparseState`` and ``Reducer`` take them."""


class Scheme(NamedTuple):
    """One row of the table.

    Attributes:
        summary: what the scheme does, in one line.
        selector: makes the selector from a density and a seed. None: every element is sent.
        exchange: makes the aggregator from a transport.
        memory: makes the scheme's default memory.
    """

    summary: str
    selector: Callable[[float | DensitySchedule, int], Selector] | None
    exchange: Callable[[str | Transport], Aggregator]
    memory: Callable[[], Memory]


SCHEMES: Final[dict[str, Scheme]] = {
    "dense": Scheme("everything, by all-reduce in float32", None, Dense, NoMemory),
    "topk": Scheme(
        "exact top-k of every rank, all-gathered",
        lambda density, seed: TopK(density),
        AllGather,
        ErrorFeedback,
    ),
    "gtopk": Scheme(
        "global top-k by recursive doubling", lambda density, seed: TopK(density), GTopK, ErrorFeedback
    ),
    "gtopk-tree": Scheme(
        "global top-k by reduction to rank 0 and broadcast, the paper's form",
        lambda density, seed: TopK(density),
        lambda transport: GTopK(transport, algorithm="tree"),
        ErrorFeedback,
    ),
    "randomk": Scheme(
        "random-k under a mask all ranks share, all-reduced", RandomK, SharedIndices, ErrorFeedback
    ),
    "threshold": Scheme(
        "top-k above a sampled threshold, all-gathered",
        lambda density, seed: ThresholdTopK(density),
        AllGather,
        ErrorFeedback,
    ),
    "lowbit": Scheme(
        "every element in 4 bits, reduced and gathered by the owners of chunks",
        None,
        lambda transport: LowBit(4, transport),
        ErrorFeedback,
    ),
}
"""Every scheme by name. ``SparseState``'s named constructors, ``commhooks bench`` and ``scripts/`` read it.

The planner has formulas by names of its own: rows of this table, or ``lowbit`` and its bits.
"""


def make_parts(
    name: str,
    density: float | DensitySchedule | None = None,
    transport: str | Transport = "distributed",
    *,
    seed: int = 0,
    memory: Memory | None = None,
) -> Parts:
    """Makes selector, aggregator and memory of the scheme ``name``.

    Args:
        name: a key of :data:`SCHEMES`.
        density: k/n in (0, 1], or a schedule. ``"dense"`` and ``"lowbit"`` have none and ignore it.
        transport: ``"distributed"``, ``"mpi"``, or a ready ``Transport``.
        seed: of random-k's masks. The other schemes ignore it.
        memory: the memory to use. None: the scheme's default.

    Raises:
        ValueError: no scheme has that name, a density is missing, or a value is out of range.
    """
    if name not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, got {name!r}")
    scheme = SCHEMES[name]
    selector = None
    if scheme.selector is not None:
        if density is None:
            raise ValueError(f"density must be given for scheme {name!r}, got None")
        selector = scheme.selector(density, seed)
    return selector, scheme.exchange(transport), scheme.memory() if memory is None else memory


class _Unset:
    """Type of :data:`UNSET`, the default of arguments called ``memory``.

    It tells an omitted argument from an explicit None, whose meaning changed and which is warned of.
    """

    def __repr__(self) -> str:
        return "None"


UNSET: Any = _Unset()


def chosen_memory(memory: Memory | None, aggregator: Aggregator | None = None) -> Memory:
    """Returns ``memory``, or the default where it is None or :data:`UNSET`.

    The default is ``NoMemory()`` with ``Dense``, which withholds nothing, and else ``ErrorFeedback()``.

    Warns:
        FutureWarning: ``memory`` is None and not all is sent. None used to mean ``NoMemory()`` here.

    Raises:
        TypeError: ``memory`` is not a ``Memory``.
    """
    if memory is None or memory is UNSET:
        exact = isinstance(aggregator, Dense)
        default: Memory = NoMemory() if exact else ErrorFeedback()
        if memory is None and not exact:
            warnings.warn(
                "memory=None means the default, ErrorFeedback(), as everywhere in commhooks; it used to mean "
                "no memory: write memory=NoMemory() to send without error feedback",
                FutureWarning,
                stacklevel=callers_level(),
            )
        return default
    if not isinstance(memory, Memory):
        raise TypeError(
            f"memory must be a Memory such as ErrorFeedback() or NoMemory(), got {type(memory).__name__}"
        )
    return memory


def dense_memory(memory: Memory | None) -> Memory:
    """Returns the memory to use instead of ``memory`` when the exchange is dense.

    A dense exchange withholds nothing, so a plain ``ErrorFeedback`` becomes ``NoMemory()``. A memory with
    momentum, weight decay or clipping is kept, because all act on dense gradients too: momentum in the memory
    replaces the optimizer's, and without it the model would train by another rule. A memory of the user's own
    class is kept as well.
    """
    if memory is None or memory is UNSET:
        return NoMemory()
    plain = type(memory) is ErrorFeedback and memory.momentum == 0.0 and memory.clip_norm is None
    if plain and not memory.decays:
        return NoMemory()
    return memory


def check_scheme(selector: Selector | None, aggregator: Aggregator) -> None:
    """Checks that selector and aggregator fit each other.

    Raises:
        TypeError: an argument is not a ``Selector`` or not an ``Aggregator``.
        ValueError: ``Dense`` or ``LowBit`` with a selector, another aggregator without one, or
            ``SharedIndices`` with a selector whose mask differs from rank to rank.
    """
    if not isinstance(aggregator, Aggregator):
        raise TypeError(f"aggregator must be an Aggregator, got {type(aggregator).__name__}")
    if selector is not None and not isinstance(selector, Selector):
        raise TypeError(f"selector must be a Selector, got {type(selector).__name__}")
    if (selector is None) == aggregator.takes_selection:
        raise ValueError(
            f"Dense and LowBit take no selector and all others need one: got {selector!r} with {aggregator!r}"
        )
    if isinstance(aggregator, SharedIndices) and selector is not None and not selector.shared_mask:
        raise ValueError(
            f"SharedIndices needs a selector whose mask all ranks share (RandomK), got {selector!r}"
        )
