"""gTop-k: about the k largest elements of the global sum, by pairwise merges, in O(k log P) traffic."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import says_what_to_write
from ..gradient.sparse_grad import SparseGrad, empty_message, places
from ..native import ops
from ..transports import Transport
from ..wire.message import HEADER_BYTES, Context, OutOfStepError, pack, unpack
from .base import Aggregated, Aggregator

ALGORITHMS = ("doubling", "tree")
# Tags within an exchange (``ROUNDS_PER_BUCKET``). Rounds of doubling and of the tree are 1 to 15.
_FOLD_ROUND = 0
_RESULT_ROUND = 31
_MEET_TAG = 15  # the wait before round i of doubling has this tag + i
_DIFFERS = -1  # instead of the next step's number of pairs, once contexts are known to differ


class GTopK(Aggregator):
    """Global top-k (Shi et al., arXiv:1901.04359; IJCAI 2019, eq. 4 to 7), for any number of ranks.

    A merge of two selections keeps the k largest magnitudes of their sum. Values keep their sign, ties go to
    the lower index, and every rank gets the same bits. A value that any merge drops did not contribute, even
    when its index comes back from another branch: it is refused and returns to its rank's residual. So
    gradient mass is conserved for every P. The original code restores only what is absent from the final set,
    and so loses mass.

    Merging is not associative, so the shape of the tree is part of the algorithm. Let p be the largest power
    of two with ``p <= P``. Ranks ``p .. P-1`` first send their pairs to ranks ``0 .. P-p-1``, which merge
    them (they fold in). The first p ranks then combine as a binary tree.

    Args:
        transport: ``"distributed"``, ``"mpi"``, or a ready ``Transport``.
        algorithm: ``"doubling"`` exchanges both ways in log2 p rounds. Every rank sees the merges of its own
            group, so it knows without traffic which of its pairs survived. ``"tree"`` is the paper's
            reduction to rank 0 and broadcast, in 2 log2 p rounds. The result comes back with k bits that say
            which pairs survived. Both give the same result.

    Raises:
        ValueError: an unknown algorithm.
    """

    @says_what_to_write
    def __init__(self, transport: str | Transport = "distributed", algorithm: str = "doubling") -> None:
        super().__init__(transport)
        if algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm must be one of {ALGORITHMS}, got {algorithm!r}")
        self.algorithm = algorithm

    def aggregate(
        self, transport: Transport, pairs: SparseGrad, nonfinite: bool, context: Context
    ) -> Aggregated:
        merged, messages = _Merged(pairs, nonfinite), _Messages(transport, pairs, context)
        with transport.one_deadline():
            self._exchange(merged, messages, transport.rank, transport.world_size)
        if messages.differs is not None:
            raise messages.differs
        kept = merged.own.alive
        return Aggregated(
            merged.pairs.values[None],
            merged.pairs.indices[None],
            contributed=pairs.masked(kept),
            refused=pairs.masked(~kept),
            nonfinite=merged.nonfinite,
        )

    def _exchange(self, merged: _Merged, messages: _Messages, rank: int, size: int) -> None:
        """Folds the ranks beyond a power of two in, combines, and returns the result to them."""
        core = 1 << (size.bit_length() - 1)
        if rank >= core:
            messages.send(rank - core, merged, _FOLD_ROUND)
            merged.replace(*messages.receive_result(rank - core))
        else:
            folds = rank + core < size  # rank + core folds into this rank
            if folds:
                merged.add(*messages.receive(rank + core, _FOLD_ROUND), child=rank + core)
            if self.algorithm == "doubling":
                _doubling(merged, messages, rank, core)
            else:
                _tree(merged, messages, rank, core)
            if folds:
                messages.send_result(rank + core, merged)

    def wire_bytes(self, k: int, world_size: int) -> int:
        message, bits = 8 * k + HEADER_BYTES, (k + 7) // 8
        core = 1 << (world_size.bit_length() - 1)
        folds = 0 if core == world_size else message + bits
        rounds = core.bit_length() - 1
        return folds + rounds * (message if self.algorithm == "doubling" else message + bits)

    def settings(self) -> dict[str, object]:
        return {"algorithm": self.algorithm}


def _doubling(merged: _Merged, messages: _Messages, rank: int, core: int) -> None:
    """Merges by recursive doubling among ``core`` ranks. Both partners merge, so both know what survived."""
    distance, number = 1, 1
    while distance < core:
        partner = rank ^ distance
        merged.add(*messages.swap(partner, merged, number, meet=core != messages.transport.world_size))
        distance, number = 2 * distance, number + 1


def _tree(merged: _Merged, messages: _Messages, rank: int, core: int) -> None:
    """Merges by a binomial tree to rank 0. Result and survival bits go back down the same tree."""
    distance, number = 1, 1
    children: list[int] = []
    while distance < core and not rank & distance:
        child = rank | distance
        merged.add(*messages.receive(child, number), child=child)
        children.append(child)
        distance, number = 2 * distance, number + 1
    if rank:
        parent = rank ^ distance
        messages.send(parent, merged, number)
        merged.replace(*messages.receive_result(parent))
    for child in reversed(children):
        messages.send_result(child, merged)


class _Tracked:
    """Records which pairs of one selection are still part of the merged sum.

    Attributes:
        indices: shape ``(k,)``, int32, ascending: the selection's.
        alive: bool ``(k,)``, True at the pairs that no merge has dropped.
    """

    def __init__(self, indices: Tensor) -> None:
        self.indices = indices
        self.alive = torch.ones(indices.numel(), dtype=torch.bool, device=indices.device)

    def keep_only(self, merged: Tensor) -> None:
        """Marks pairs as dropped whose index is not among the ascending indices ``merged``."""
        self.alive &= ops.contains(self.indices, merged)


class _Merged:
    """The merged sum of this rank's group so far, and which pairs of its inputs survived.

    Attributes:
        pairs: the k largest of the sum.
        nonfinite: whether a rank of the group voted non-finite.
        own: this rank's selection.
        children: by rank, the pairs of each rank that must be told later which of its pairs survived.
    """

    def __init__(self, pairs: SparseGrad, nonfinite: bool) -> None:
        self.pairs, self.nonfinite = pairs, nonfinite
        self.own = _Tracked(pairs.indices)
        self.children: dict[int, _Tracked] = {}

    def add(self, other: SparseGrad, vote: bool, child: int | None = None) -> None:
        """Merges another group's sum. ``child``: its rank, if that rank must be told later what survived."""
        if child is not None:
            self.children[child] = _Tracked(other.indices)
        mine = self.pairs
        message = empty_message(mine.k, mine.indices.device)
        merged = ops.merge_topk(
            mine.values, mine.indices, other.values, other.indices, mine.k, out=places(message)
        )
        self.pairs = SparseGrad(merged.values, merged.indices, mine.numel, message)
        self.nonfinite |= vote
        for tracked in (self.own, *self.children.values()):
            if tracked.indices is mine.indices:  # the merge reports which pairs of its inputs survived
                tracked.alive &= merged.survives_a
            elif tracked.indices is other.indices:
                tracked.alive &= merged.survives_b
            else:
                tracked.keep_only(merged.indices)

    def replace(self, result: SparseGrad, vote: bool, survives: Tensor) -> None:
        """Replaces the group's sum by the final result.

        Args:
            result: the final pairs.
            vote: whether any rank voted non-finite.
            survives: bool ``(k,)``: which pairs of the group's sum are part of the result.
        """
        survived = self.pairs.indices[survives]
        self.pairs, self.nonfinite = result, vote
        for tracked in (self.own, *self.children.values()):
            if survived.numel():
                tracked.keep_only(survived)
            else:
                tracked.alive.zero_()


class _Messages:
    """Sends and receives the messages of one exchange. A round's number is part of its tag.

    Attributes:
        differs: the error for a rank that is at another step, or will send another number of pairs at the
            next one. The exchange goes on, so that all ranks learn of it: later messages announce
            ``_DIFFERS``.
    """

    def __init__(self, transport: Transport, pairs: SparseGrad, context: Context) -> None:
        self.differs: OutOfStepError | None = None
        self.transport, self.context = transport, context
        self._k, self._numel, self._device = pairs.k, pairs.numel, pairs.indices.device

    def swap(self, peer: int, merged: _Merged, number: int, meet: bool) -> tuple[SparseGrad, bool]:
        """Sends the sum to ``peer`` and receives that rank's.

        Args:
            peer: the partner.
            merged: this rank's sum.
            number: the round's number.
            meet: whether to wait for the partner first. Needed when the world size is no power of two: ranks
                that fold another rank in come later.
        """
        if meet and self.transport.sends_early:
            self._meet(peer, number)
        message = empty_message(self._k, self._device)
        self._move([(peer, self._packed(merged))], [(peer, message)], number)
        return self._unpacked(message, peer)

    def send(self, peer: int, merged: _Merged, number: int) -> None:
        """Sends the sum to ``peer``."""
        self._move([(peer, self._packed(merged))], [], number)

    def receive(self, peer: int, number: int) -> tuple[SparseGrad, bool]:
        """Receives the sum of ``peer`` and its vote."""
        message = empty_message(self._k, self._device)
        self._move([], [(peer, message)], number)
        return self._unpacked(message, peer)

    def send_result(self, child: int, merged: _Merged) -> None:
        """Sends the final result to ``child``, with one bit for each pair that ``child`` had sent."""
        bits = _pack_bits(merged.children[child].alive)
        message = torch.cat((self._packed(merged).view(torch.uint8), bits))
        self._move([(child, message)], [], _RESULT_ROUND)

    def receive_result(self, parent: int) -> tuple[SparseGrad, bool, Tensor]:
        """Receives the final result from ``parent``.

        Returns:
            The pairs, the vote, and bool ``(k,)``: which pairs sent to ``parent`` are part of the result.
        """
        body_bytes = HEADER_BYTES + 8 * self._k
        message = torch.empty(body_bytes + (self._k + 7) // 8, dtype=torch.uint8, device=self._device)
        self._move([], [(parent, message)], _RESULT_ROUND)
        result, vote = self._unpacked(message[:body_bytes].view(torch.int32), parent)
        return result, vote, _unpack_bits(message[body_bytes:], self._k)

    def _meet(self, peer: int, number: int) -> None:
        """Waits until ``peer`` is at this round too, by exchanging empty messages.

        Ranks that fold no other rank in reach a round earlier. A message that they send too early would take
        bandwidth from the messages that the later ranks still wait for.
        """
        nothing = torch.empty(0, dtype=torch.int32, device=self.transport.device_type)
        self.transport.exchange(
            [(peer, nothing)],
            [(peer, nothing.clone())],
            tag=self.context.tag + _MEET_TAG + number,
            what=f"{self.context}, before round {number}",
        )

    def _packed(self, merged: _Merged) -> Tensor:
        context = self.context if self.differs is None else self.context.announcing(_DIFFERS)
        return pack(merged.pairs, merged.nonfinite, context)

    def _unpacked(self, message: Tensor, sender: int) -> tuple[SparseGrad, bool]:
        try:
            return unpack(message, self._numel, sender, self.context)
        except OutOfStepError as error:
            self.differs = self.differs or error
            return unpack(message, self._numel, sender, error.theirs)

    def _move(self, sends: list[tuple[int, Tensor]], receives: list[tuple[int, Tensor]], number: int) -> None:
        what = f"{self.context}, round {number}"
        self.transport.exchange(sends, receives, tag=self.context.tag + number, what=what)


_BIT_VALUES = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device="cpu")


def _pack_bits(mask: Tensor) -> Tensor:
    """Packs bool ``(k,)`` into uint8 ``(ceil(k / 8),)``, lowest bit first."""
    padded = mask.new_zeros((mask.numel() + 7) // 8 * 8, dtype=torch.uint8)
    padded[: mask.numel()] = mask
    return (padded.view(-1, 8) * _BIT_VALUES.to(mask.device)).sum(1, dtype=torch.uint8)


def _unpack_bits(packed: Tensor, k: int) -> Tensor:
    """Unpacks what :func:`_pack_bits` packed: bool ``(k,)``."""
    return (packed[:, None] & _BIT_VALUES.to(packed.device)).ne(0).view(-1)[:k]
