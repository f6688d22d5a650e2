"""``Sizes``: how many pairs each bucket sends, as the ranks announced it one step ahead."""

from __future__ import annotations

from ..selection.selectors import Selector


class Sizes:
    """Keeps the numbers of pairs that the ranks announced, by bucket and step.

    A message whose size differs from rank to rank ends the process inside gloo. So every exchange carries the
    number of pairs of the bucket's next step, and the ranks compare it before they need it. A density that
    changes without its schedule, such as one that the user assigns, takes effect one step later.
    """

    def __init__(self) -> None:
        self._announced: dict[int, dict[int, int]] = {}

    def at(self, selector: Selector, bucket: int, numel: int, step: int, is_new: bool) -> tuple[int, int]:
        """Returns the bucket's numbers of pairs at ``step`` and at the step after it.

        Args:
            selector: says how many pairs a step sends.
            bucket: the bucket's index.
            numel: its number of elements.
            step: the present step.
            is_new: whether the ranks compare their settings before this exchange. Then nothing that was
                announced holds.
        """
        announced = {} if is_new else self._announced.get(bucket, {})
        k = announced.get(step, selector.k(numel, step))
        following = selector.k(numel, step + 1)
        self._announced[bucket] = {step: k, step + 1: following}
        return k, following

    def changes(self, bucket: int) -> bool:
        """Whether the bucket's last exchange announced another number of pairs than it had itself."""
        return len(set(self._announced.get(bucket, {}).values())) > 1
