"""Predicts the seconds of one bucket's exchange per scheme (formulas: docs/cost-model.md), in pure Python.

The model is alpha-beta-gamma: seconds per message, per byte and per element. Every prediction is linear in
the fields of :class:`Costs`. The functions named ``*_terms`` return the factors. So the same formulas predict
(factors times costs) and are fitted (least squares over measured times).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from ..transports.recursive_doubling import DOUBLING_BYTES
from ..wire.low_bit import BLOCK
from ..wire.message import HEADER_BYTES

LOW_BIT = {"lowbit1": 1, "lowbit2": 2, "lowbit4": 4, "lowbit8": 8}
"""The schemes that send every element in few bits, and the bits of each."""
SCHEMES = ("dense", "topk", "gtopk", "gtopk-tree", "randomk", *LOW_BIT)
"""The schemes with a formula: rows of ``commhooks.schemes.SCHEMES``, or ``lowbit`` and its bits."""
_PAIR_BYTES = 8
_VALUE_BYTES = 4


@dataclass(frozen=True)
class Costs:
    """The costs of this network and device, in seconds.

    Attributes:
        message_s: alpha: one point-to-point round, without its bytes.
        byte_s: beta: one byte on the busiest link, one way.
        ring_step_s: alpha of a collective: one of its steps, without its bytes.
        reduce_s: gamma: adding one received element inside an all-reduce.
        merge_s: gamma: one pair of either input of a gTop-k merge, including the bits of what survives.
        select_s: gamma: top-k selection and memory update, per gradient element.
        gather_s: gamma: random-k's memory update, per gradient element.
        write_s: gamma: overwriting the gradient with the result, per element.
        bucket_s: constant per sparse bucket: waking the thread, packing, bookkeeping.
        dense_bucket_s: constant per dense bucket, likewise.
        encode_s: gamma: one element written in few bits, and what is left of it.
        decode_s: gamma: the value of few bits added to one element.

    Raises:
        ValueError: a cost is negative or not finite.
    """

    message_s: float
    byte_s: float
    ring_step_s: float
    reduce_s: float
    merge_s: float
    select_s: float
    gather_s: float
    write_s: float
    bucket_s: float
    dense_bucket_s: float = 0.0
    encode_s: float = 0.0
    decode_s: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0.0 <= value < float("inf"):
                raise ValueError(f"{field.name} must be finite and at least 0, got {value!r}")

    def summary(self) -> str:
        """Returns the main costs as one line of text."""
        bandwidth = f"{8e-6 / self.byte_s:,.0f} Mbit/s" if self.byte_s else "no limit seen"
        return (
            f"message {self.message_s * 1e6:.0f} us, bandwidth {bandwidth}, selection "
            f"{self.select_s * 1e9:.2f} ns, write-back {self.write_s * 1e9:.2f} ns and low-bit code "
            f"{(self.encode_s + 2 * self.decode_s) * 1e9:.2f} ns per element, merge "
            f"{self.merge_s * 1e9:.1f} ns per pair"
        )

    def total(self, terms: Mapping[str, float]) -> float:
        """Returns the seconds of an exchange: the sum of factors times costs.

        Args:
            terms: by name of a cost, its factor.
        """
        return sum(float(getattr(self, name)) * factor for name, factor in terms.items())


def core_rounds(world_size: int) -> tuple[int, bool]:
    """Returns ``(floor(log2 P), whether P is not a power of two)``."""
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, got {world_size}")
    rounds = world_size.bit_length() - 1
    return rounds, world_size != 1 << rounds


def exchange_terms(
    scheme: str, numel: int, k: int, world_size: int, crowding: float = 1.0
) -> dict[str, float]:
    """Returns the factors of :class:`Costs` for one exchange, by name. Those that are 0 are left out.

    Args:
        scheme: one of ``SCHEMES``.
        numel: elements of the bucket (only dense and low-bit use it).
        k: pairs per rank (of the others).
        world_size: P.
        crowding: ranks per core where more ranks than cores share a machine, else 1. It multiplies the
            computation's factors.

    Raises:
        ValueError: an unknown scheme or a number out of range.
    """
    _check(scheme, numel, k, crowding)
    # Collectives count as recursive doubling where P is a power of two and the message has at most
    # DOUBLING_BYTES, as over gloo, else as a ring.
    rounds, folds = core_rounds(world_size)
    if world_size == 1:
        return {}
    if scheme in ("dense", "randomk"):
        sent = (numel if scheme == "dense" else k) + 1
        if not folds and _VALUE_BYTES * sent <= DOUBLING_BYTES:
            return {
                "message_s": float(rounds),
                "byte_s": float(rounds * _VALUE_BYTES * sent),
                "reduce_s": rounds * sent * crowding,
            }
        share = (world_size - 1) / world_size
        return {
            "ring_step_s": 2.0 * (world_size - 1),
            "byte_s": 2 * share * _VALUE_BYTES * sent,
            "reduce_s": share * sent * crowding,
        }
    if scheme in LOW_BIT:
        return _low_bit_terms(LOW_BIT[scheme], numel, world_size, crowding)
    message = _PAIR_BYTES * k + HEADER_BYTES
    if scheme == "topk":
        if not folds and message <= DOUBLING_BYTES:
            return {"message_s": float(rounds), "byte_s": float((world_size - 1) * message)}
        return {"ring_step_s": float(world_size - 1), "byte_s": float((world_size - 1) * message)}
    bits = (k + 7) // 8
    down = rounds if scheme == "gtopk-tree" else 0  # messages that bring the result back
    up = rounds + folds
    down += folds
    return {
        "message_s": float(up + down),
        "byte_s": float(up * message + down * (message + bits)),
        "merge_s": up * 2.0 * k * crowding,
    }


def _low_bit_terms(bits: int, numel: int, world_size: int, crowding: float) -> dict[str, float]:
    """Every rank sends each owner its chunk's codes, and the owners' sums are all-gathered, coded again."""
    rounds, folds = core_rounds(world_size)
    blocks = -(-numel // BLOCK)
    chunk = min(numel, -(-blocks // world_size) * BLOCK)
    message = HEADER_BYTES + 2 * -(-chunk // BLOCK) + -(-chunk * bits // 8)
    others = world_size - 1
    doubles = not folds and message <= DOUBLING_BYTES
    gathers = {"message_s": float(others + rounds)} if doubles else {"ring_step_s": float(others)}
    return {
        "message_s": float(others),
        **gathers,
        "byte_s": float(2 * others * message),
        "encode_s": (numel + chunk) * crowding,
        "decode_s": (world_size * chunk + numel) * crowding,
    }


def step_terms(scheme: str, numel: int, k: int, world_size: int, crowding: float = 1.0) -> dict[str, float]:
    """Returns the factors for all work on one bucket: select (not for dense), exchange, write back."""
    terms = exchange_terms(scheme, numel, k, world_size, crowding)
    if scheme == "dense":
        return terms | {"write_s": numel * crowding, "dense_bucket_s": crowding}
    sums_up = scheme == "randomk" or scheme in LOW_BIT  # and selects nothing by size
    passes = {
        "gather_s" if sums_up else "select_s": numel * crowding,
        "write_s": numel * crowding,
    }
    return terms | passes | {"bucket_s": crowding}


def exchange_s(
    costs: Costs, scheme: str, numel: int, k: int, world_size: int, crowding: float = 1.0
) -> float:
    """Predicts the seconds of one exchange. Arguments as in ``exchange_terms``."""
    return costs.total(exchange_terms(scheme, numel, k, world_size, crowding))


def step_s(costs: Costs, scheme: str, numel: int, k: int, world_size: int, crowding: float = 1.0) -> float:
    """Predicts the seconds of all work on one bucket when nothing overlaps. Arguments likewise."""
    return costs.total(step_terms(scheme, numel, k, world_size, crowding))


def periodic_averaging_s(
    costs: Costs,
    numel: int,
    world_size: int,
    period: int,
    crowding: float = 1.0,
    scheme: str = "dense",
) -> float:
    """Predicts the seconds per step of averaging ``numel`` parameters every ``period`` steps.

    Args:
        costs: of network and device.
        numel: elements of the model.
        world_size: P.
        period: K, local steps between two averagings.
        crowding: as for ``exchange_terms``.
        scheme: ``"dense"`` (M-AVG), or one of ``LOW_BIT``: an averager with that wire.
    """
    if period < 1:
        raise ValueError(f"period must be at least 1, got {period}")
    return exchange_s(costs, scheme, numel, 0, world_size, crowding) / period


def exposed_s(bucket_s: float, buckets: int, backward_s: float) -> float:
    """Returns the seconds of communication that backward does not hide.

    Bucket i of B is ready at ``backward_s * (i + 1) / B``, and one thread takes the buckets in order. As all
    buckets cost the same, there are two cases: the thread waits for every bucket (only the last is exposed),
    or for the first one only (it is busy from then on).

    Args:
        bucket_s: seconds one bucket takes.
        buckets: B.
        backward_s: seconds of one backward. 0 hides nothing.

    Raises:
        ValueError: ``buckets`` or ``backward_s`` out of range.
    """
    check_backward_s(backward_s)
    if buckets < 1:
        raise ValueError(f"buckets must be at least 1, got {buckets}")
    return max(bucket_s, buckets * bucket_s - backward_s * (buckets - 1) / buckets)


def check_backward_s(backward_s: float) -> None:
    """Raises ``ValueError`` unless ``backward_s`` is finite and at least 0."""
    if not 0.0 <= backward_s < float("inf"):
        raise ValueError(f"backward_s must be finite and at least 0, got {backward_s!r}")


def _check(scheme: str, numel: int, k: int, crowding: float) -> None:
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {SCHEMES}, got {scheme!r}")
    if numel < 0 or k < 0:
        raise ValueError(f"numel and k must be at least 0, got {numel} and {k}")
    if not crowding > 0:
        raise ValueError(f"crowding must be positive, got {crowding}")
