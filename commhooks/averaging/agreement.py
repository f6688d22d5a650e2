"""The header that ranks exchange before they average: a checksum of their settings, and their votes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..exchange.agreement import MESSAGE_BYTES, compare, encode, gather_agreed

Gather = Callable[[Tensor], tuple[Tensor, list[int]]]
"""Takes this rank's message ``(n,)`` uint8; returns the messages ``(m, n)`` of m ranks, and these ranks."""


@dataclass(frozen=True)
class Header:
    """What one rank says before an averaging. Fingerprints are 0 where there is nothing to compare.

    Attributes:
        settings: what must be the same on all ranks, by name.
        start: fingerprint of the starting point.
        part: fingerprint of the numbers of the tensors that take part.
        model: fingerprint of the model.
        nonfinite: whether this rank's tensors hold NaN or Inf.
        nonfinite_buffers: whether this rank's buffers do.
        weight: this rank's share in averages, relative to the others'.
    """

    settings: Mapping[str, object]
    start: int
    part: int
    model: int
    nonfinite: bool
    nonfinite_buffers: bool
    weight: float

    def votes(self) -> Tensor:
        """Returns all but the settings, as a message ``(40,)`` uint8."""
        flags = int(self.nonfinite) + 2 * int(self.nonfinite_buffers)
        votes = torch.tensor([self.start, self.part, self.model, flags, 0], dtype=torch.int64, device="cpu")
        votes[4:].view(torch.float64)[0] = self.weight
        return votes.view(torch.uint8)


@dataclass(frozen=True)
class Ranks:
    """What the ranks said in their headers.

    Attributes:
        weights: of the ranks that were heard, by rank.
        nonfinite: ranks whose tensors hold NaN or Inf.
        nonfinite_buffers: whether any rank's buffers do.
        starts_differ: whether the ranks' starting points differ.
        part_differs: whether the ranks differ in which tensors take part.
        models_equal: whether all ranks have the same model.
    """

    weights: dict[int, float]
    nonfinite: tuple[int, ...] = ()
    nonfinite_buffers: bool = False
    starts_differ: bool = False
    part_differs: bool = False
    models_equal: bool = False

    @property
    def uniform(self) -> bool:
        """Whether all ranks have one weight."""
        return len(set(self.weights.values())) == 1

    def share(self, rank: int) -> float | None:
        """Returns the rank's share of an average, 0 where it is left out, or None where all are equal."""
        if self.uniform and not self.nonfinite:
            return None
        left = {r: w for r, w in self.weights.items() if r not in self.nonfinite}
        return left.get(rank, 0.0) / sum(left.values())

    def full_share(self, rank: int) -> float | None:
        """Returns the rank's share of an average that leaves no rank out, or None where all are equal."""
        return None if self.uniform else self.weights[rank] / sum(self.weights.values())


def agree(header: Header, gather: Gather, what: str, rank: int, *, at_once: bool) -> Ranks:
    """Compares the settings and collects the votes.

    Args:
        header: this rank's.
        gather: collects messages.
        what: names the averaging in errors.
        rank: this rank.
        at_once: send the settings themselves instead of their checksum first. Needed among neighbours, where
            not all ranks see a difference and a second exchange would hang.

    Raises:
        SettingsMismatchError: the message names every setting that differs, with both values and ranks.
    """
    if at_once:
        gathered, ranks = gather(torch.cat((encode(header.settings), header.votes())))
        compare(gathered[:, :MESSAGE_BYTES], rank, what, ranks=ranks)
        votes = gathered[:, MESSAGE_BYTES:].contiguous()
    else:
        votes = gather_agreed(header.settings, header.votes(), lambda own: gather(own)[0], rank, what)
        ranks = list(range(len(votes)))
    return _read(votes.view(torch.int64), ranks)


def _read(votes: Tensor, ranks: list[int]) -> Ranks:
    starts, parts, models, flags, _ = (column.tolist() for column in votes.unbind(1))
    weights = votes[:, 4].contiguous().view(torch.float64).tolist()
    return Ranks(
        weights=dict(zip(ranks, weights, strict=True)),
        nonfinite=tuple(r for r, flag in zip(ranks, flags, strict=True) if flag & 1),
        nonfinite_buffers=any(flag & 2 for flag in flags),
        starts_differ=len(set(starts)) > 1,
        part_differs=len(set(parts)) > 1,
        models_equal=len(set(models)) == 1 and models[0] != 0,
    )
