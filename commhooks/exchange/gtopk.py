"""gTop-k: the k largest of the global sum, by a tree of pairwise merges in O(k log P) traffic."""

from __future__ import annotations

import torch
from torch import Tensor

from ..gradient.sparse_grad import SparseGrad
from ..native import ops
from ..transports import Transport
from ..wire.message import HEADER_BYTES, Context, empty_message, pack, unpack
from .base import Aggregated, Aggregator

ALGORITHMS = ("doubling", "tree")
_LAST_ROUND = 31
_MEET_TAG = 15  # and up: one for each round of doubling, of which there are at most 15


class GTopK(Aggregator):
    """Global top-k (Shi et al., arXiv:1901.04359; IJCAI 2019, eq. 4 to 7), for any number of ranks.

    Merging two selections keeps the k largest magnitudes of their sum; values keep their sign, ties go to the
    lower index, and every rank gets the same bits. A rank's value that any merge drops did not contribute,
    even when its index comes back from another branch: it is refused and returns to that rank's residual. So
    gradient mass is conserved for every P; restoring only what is absent from the final set, as the original
    code does, loses mass.

    The shape of the tree is part of the algorithm, for merging is not associative. With ``p = 2 ** floor(log2
    P)``, ranks ``p .. P-1`` first fold into ranks ``0 .. P-p-1``; the first p ranks then combine as a binary
    tree.

    Args:
        transport: ``"distributed"``, ``"mpi"``, or a ready ``Transport``.
        algorithm: ``"doubling"`` exchanges both ways in log2 p rounds and every rank sees the merges of its
            own group, so what survived costs no traffic. ``"tree"`` is the paper's reduction to rank 0 and
            broadcast, 2 log2 p rounds, in which the result comes back with k survival bits. Both give the
            same result.
    """

    def __init__(self, transport: str | Transport = "distributed", algorithm: str = "doubling") -> None:
        super().__init__(transport)
        if algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm must be one of {ALGORITHMS}, got {algorithm!r}")
        self.algorithm = algorithm

    def aggregate(
        self, transport: Transport, pairs: SparseGrad, nonfinite: bool, context: Context
    ) -> Aggregated:
        merge = _Merge(transport, pairs, nonfinite, context)
        folded = merge.core_size + merge.rank  # the rank that folds into this one, if it exists
        if merge.rank >= merge.core_size:
            merge.send_up(merge.rank - merge.core_size, 0)
        else:
            if folded < merge.world_size:
                merge.merge_from(folded, 0)
            if self.algorithm == "doubling":
                _doubling(merge)
            else:
                _tree(merge)
            if folded < merge.world_size:
                merge.send_down(folded)
        kept = merge.tracked[0].alive
        return Aggregated(
            merge.pairs.values[None],
            merge.pairs.indices[None],
            contributed=pairs.masked(kept),
            refused=pairs.masked(~kept),
            nonfinite=merge.nonfinite,
        )

    def wire_bytes(self, k: int, world_size: int) -> int:
        message, bits = 8 * k + HEADER_BYTES, (k + 7) // 8
        core = 1 << (world_size.bit_length() - 1)
        folds = 0 if core == world_size else message + bits
        rounds = core.bit_length() - 1
        return folds + rounds * (message if self.algorithm == "doubling" else message + bits)

    def settings(self) -> dict[str, object]:
        return {"algorithm": self.algorithm}


def _doubling(merge: _Merge) -> None:
    """Recursive doubling among the core ranks: both partners merge, so both know what survived."""
    distance, round_number = 1, 1
    while distance < merge.core_size:
        merge.exchange_with(merge.rank ^ distance, round_number)
        distance, round_number = 2 * distance, round_number + 1


def _tree(merge: _Merge) -> None:
    """Binomial reduction to rank 0, then the way back with the result and the survival bits."""
    distance, round_number = 1, 1
    children: list[int] = []
    while distance < merge.core_size and not merge.rank & distance:
        merge.merge_from(merge.rank | distance, round_number)
        children.append(merge.rank | distance)
        distance, round_number = 2 * distance, round_number + 1
    if merge.rank:
        merge.send_up(merge.rank ^ distance, round_number)
    for child in reversed(children):
        merge.send_down(child)


class _Tracked:
    """Which of some ascending indices are still part of the merged sum."""

    def __init__(self, indices: Tensor) -> None:
        self.indices = indices
        self.alive = torch.ones(indices.numel(), dtype=torch.bool, device=indices.device)

    def keep_only(self, merged: Tensor) -> None:
        """Drops what is not among the ascending indices ``merged``."""
        self.alive &= ops.contains(self.indices, merged)


class _Merge:
    """The state of one gTop-k exchange on one rank."""

    def __init__(self, transport: Transport, pairs: SparseGrad, nonfinite: bool, context: Context) -> None:
        self.transport, self.context = transport, context
        self.rank, self.world_size = transport.rank, transport.world_size
        self.core_size = 1 << (self.world_size.bit_length() - 1)
        self.pairs, self.nonfinite = pairs, nonfinite
        self.tracked = [_Tracked(pairs.indices)]  # this rank's own pairs first, then each child's message
        self.children: dict[int, _Tracked] = {}

    def exchange_with(self, peer: int, round_number: int) -> None:
        """Swaps partial results with ``peer`` and merges."""
        if self.transport.sends_early and self.core_size != self.world_size:
            self._meet(peer, round_number)
        message = empty_message(self.pairs.k, self.pairs.indices.device)
        self._move([(peer, self._packed())], [(peer, message)], round_number)
        self._absorb(unpack(message, self.pairs.numel, peer, self.context))

    def _meet(self, peer: int, round_number: int) -> None:
        """Waits until ``peer`` is at this round too.

        Where some ranks have folded others in, the rest is ahead of them: what it sends too early would take
        the link that the late ones still need for the round before.
        """
        nothing = self.pairs.indices.new_empty(0)
        self.transport.exchange(
            [(peer, nothing)],
            [(peer, nothing.clone())],
            tag=self.context.tag + _MEET_TAG + round_number,
            what=f"{self.context}, before round {round_number}",
        )

    def merge_from(self, child: int, round_number: int) -> None:
        """Receives ``child``'s partial result, merges, and remembers what it sent."""
        message = empty_message(self.pairs.k, self.pairs.indices.device)
        self._move([], [(child, message)], round_number)
        received, vote = unpack(message, self.pairs.numel, child, self.context)
        self.children[child] = _Tracked(received.indices)
        self.tracked.append(self.children[child])
        self._absorb((received, vote))

    def send_up(self, parent: int, round_number: int) -> None:
        """Hands the partial result to ``parent`` and waits for the result and the bits of what survived."""
        sent = self.pairs.indices
        self._move([(parent, self._packed())], [], round_number)
        k, device = self.pairs.k, self.pairs.indices.device
        message = torch.empty(_down_bytes(k), dtype=torch.uint8, device=device)
        self._move([], [(parent, message)], _LAST_ROUND)
        body = message[: 4 * empty_message(k, device).numel()].view(torch.int32)
        self.pairs, self.nonfinite = unpack(body, self.pairs.numel, parent, self.context)
        survived = sent[_unpack_bits(message[body.numel() * 4 :], k)]
        for tracked in self.tracked:
            if survived.numel():
                tracked.keep_only(survived)
            else:
                tracked.alive.zero_()

    def send_down(self, child: int) -> None:
        """Hands the result to ``child`` with one bit for each pair it had sent."""
        body = self._packed().view(torch.uint8)
        bits = _pack_bits(self.children[child].alive)
        self._move([(child, torch.cat((body, bits)))], [], _LAST_ROUND)

    def _absorb(self, received: tuple[SparseGrad, bool]) -> None:
        other, vote = received
        mine = self.pairs
        merged = ops.merge_topk(mine.values, mine.indices, other.values, other.indices, mine.k)
        self.pairs, self.nonfinite = (
            SparseGrad(merged.values, merged.indices, mine.numel),
            self.nonfinite | vote,
        )
        for tracked in self.tracked:
            if tracked.indices is mine.indices:  # the merge itself says what survived of its inputs
                tracked.alive &= merged.survives_a
            elif tracked.indices is other.indices:
                tracked.alive &= merged.survives_b
            else:
                tracked.keep_only(merged.indices)

    def _packed(self) -> Tensor:
        return pack(self.pairs, self.nonfinite, self.context)

    def _move(
        self, sends: list[tuple[int, Tensor]], receives: list[tuple[int, Tensor]], round_number: int
    ) -> None:
        what = f"{self.context}, round {round_number}"
        self.transport.exchange(sends, receives, tag=self.context.tag + round_number, what=what)


def _down_bytes(k: int) -> int:
    return HEADER_BYTES + 8 * k + (k + 7) // 8


_BIT_VALUES = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)


def _pack_bits(mask: Tensor) -> Tensor:
    """Bool ``(k,)`` to uint8 ``(ceil(k / 8),)``, lowest bit first."""
    padded = mask.new_zeros((mask.numel() + 7) // 8 * 8, dtype=torch.uint8)
    padded[: mask.numel()] = mask
    return (padded.view(-1, 8) * _BIT_VALUES.to(mask.device)).sum(1, dtype=torch.uint8)


def _unpack_bits(packed: Tensor, k: int) -> Tensor:
    """The inverse of :func:`_pack_bits`."""
    return (packed[:, None] & _BIT_VALUES.to(packed.device)).ne(0).view(-1)[:k]
