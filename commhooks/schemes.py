"""Which selectors and aggregators go together."""

from __future__ import annotations

from .exchange import Aggregator, Dense, SharedIndices
from .selection.selectors import Selector


def check_scheme(selector: Selector | None, aggregator: Aggregator) -> None:
    """Raises ``TypeError`` or ``ValueError`` unless they are what they should be and fit."""
    if not isinstance(aggregator, Aggregator):
        raise TypeError(f"aggregator must be an Aggregator, got {type(aggregator).__name__}")
    if selector is not None and not isinstance(selector, Selector):
        raise TypeError(f"selector must be a Selector, got {type(selector).__name__}")
    if (selector is None) != isinstance(aggregator, Dense):
        raise ValueError(
            f"Dense takes no selector and all others need one: got {selector!r} with {aggregator!r}"
        )
    if isinstance(aggregator, SharedIndices) and selector is not None and not selector.shared_mask:
        raise ValueError(
            f"SharedIndices needs a selector whose mask all ranks share (RandomK), got {selector!r}"
        )
