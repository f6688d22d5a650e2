"""Checks that all ranks have the same settings before data is sent, by messages of one fixed size.

:func:`encode` makes a rank's message and :func:`compare` reads the messages of all ranks.
:func:`gather_agreed` gathers checksums first, and the messages only where these differ. :func:`agree` does so
over a transport. Both wait for all ranks. Horovod's compressions may not wait inside backward: they start
an all-gather of their own there and call :func:`compare` later.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import SettingsMismatchError
from ..transports import Transport
from ..wire.message import RETURNED, Context

MESSAGE_BYTES = 1024
_CHECKSUM_BYTES = 8
_DERIVED = ("k", "pairs at the next step")
WAS_RETURNED = "reset or loaded since the last step"
STEP_ADVICE = {
    name: " (reset(), load_state_dict() and discard() belong on all ranks)" for name in ("step", WAS_RETURNED)
}
"""What to do when the ranks are at different steps, as ``advice`` of :func:`compare`."""
_BETWEEN_PAIRS, _WITHIN_PAIR = "\x1e", "\x1f"

Settings = Mapping[str, object]
"""Settings that must be equal on all ranks, by name.

The most telling come first, because a message may be cut off.
"""


def encode(settings: Settings) -> Tensor:
    """Encodes this rank's settings as a message.

    Returns:
        Shape ``(MESSAGE_BYTES,)``, uint8, on the CPU: a checksum of all settings, then as many as fit.
    """
    text = _BETWEEN_PAIRS.join(f"{name}{_WITHIN_PAIR}{value}" for name, value in settings.items()).encode()
    checksum = hashlib.blake2b(text, digest_size=_CHECKSUM_BYTES).digest()
    message = torch.zeros(MESSAGE_BYTES, dtype=torch.uint8, device="cpu")
    content = bytearray((checksum + text)[:MESSAGE_BYTES])
    message[: len(content)] = torch.frombuffer(content, dtype=torch.uint8)
    return message


def compare(
    messages: Tensor,
    rank: int,
    what: str,
    *,
    ranks: Sequence[int] | None = None,
    advice: Mapping[str, str] | None = None,
) -> None:
    """Raises an error unless all messages are equal. If any two ranks differ, every rank raises.

    Args:
        messages: shape ``(number of ranks, MESSAGE_BYTES)``, uint8, on the CPU. A row is a message of
            :func:`encode`.
        rank: this rank.
        what: names the exchange in the error.
        ranks: whose messages they are, in the order of the rows; default: 0, 1, ...
        advice: by setting, what to do when it differs. The error says it after the values.

    Raises:
        SettingsMismatchError: the ranks differ. The text names every setting that differs, with this rank's
            value and the others'.
    """
    whose = list(range(len(messages))) if ranks is None else list(ranks)
    mine = messages[whose.index(rank)]
    others = [(r, row) for r, row in zip(whose, messages, strict=True) if not torch.equal(row, mine)]
    if not others:
        return
    here, there = _read(mine), {r: _read(row) for r, row in others}
    names = list(dict.fromkeys(name for found in (here, *there.values()) for name in found))
    told = {name: text for name in names if (text := _difference(name, here, there))}
    # A density or step that differs makes k differ too. Only the cause is reported.
    causes = {name: text for name, text in told.items() if name not in _DERIVED} or told
    lines = [f"{text}{(advice or {}).get(name, '')}" for name, text in causes.items()]
    if not lines:
        lines = [
            f"settings beyond the first {MESSAGE_BYTES} bytes differ on {_named(list(there))} (by checksum)"
        ]
    raise SettingsMismatchError(f"rank {rank}, {what}: the ranks disagree on {'; '.join(lines)}")


def agree(
    transport: Transport,
    settings: Settings,
    *,
    tag: int,
    what: str,
    advice: Mapping[str, str] | None = None,
    note: float = 0.0,
) -> list[float]:
    """Compares ``settings`` over all ranks of ``transport``. A collective call that waits for all ranks.

    The ranks gather 16 bytes each: a checksum and ``note``. Where checksums differ they also gather the
    messages of :func:`encode`, so that the error can name values.

    Args:
        transport: connects the ranks.
        settings: this rank's.
        tag: of the messages.
        what: names the exchange in errors.
        advice: see :func:`compare`.
        note: a number that this rank tells the others. It is not compared.

    Returns:
        The ranks' notes, in rank order.

    Raises:
        SettingsMismatchError: as :func:`compare`, on every rank.
    """

    def gather(own: Tensor) -> Tensor:
        gathered = own.new_empty((transport.world_size, own.numel()))
        transport.all_gather(own, gathered, tag=tag, what=f"{what}, agreement on settings")
        return gathered

    payload = torch.tensor([note], dtype=torch.float64, device="cpu").view(torch.uint8)
    notes = gather_agreed(settings, payload, gather, transport.rank, what, advice=advice)
    return [float(x) for x in notes.view(torch.float64)]


def gather_agreed(
    settings: Settings,
    payload: Tensor,
    gather: Callable[[Tensor], Tensor],
    rank: int,
    what: str,
    *,
    advice: Mapping[str, str] | None = None,
) -> Tensor:
    """Gathers the ranks' payloads with a checksum of their settings, and compares the settings.

    Where checksums differ it gathers once more: the messages of :func:`encode`.

    Args:
        settings: this rank's.
        payload: ``(n,)`` uint8, of one size on all ranks. It is not compared.
        gather: takes this rank's message ``(m,)`` uint8; returns those of all P ranks, ``(P, m)``.
        rank: this rank.
        what: names the exchange in errors.
        advice: see :func:`compare`.

    Returns:
        The payloads ``(P, n)``, in rank order.

    Raises:
        SettingsMismatchError: as :func:`compare`, on every rank.
    """
    message = encode(settings)
    gathered = gather(torch.cat((message[:_CHECKSUM_BYTES], payload)))
    checksums = gathered[:, :_CHECKSUM_BYTES]
    if not torch.equal(checksums, checksums[:1].expand_as(checksums)):
        compare(gather(message), rank, what, advice=advice)
    return gathered[:, _CHECKSUM_BYTES:].contiguous()


def agree_on_context(transport: Transport, context: Context) -> None:
    """Compares which exchange each rank is in, and what it will send next. A collective call.

    Raises:
        SettingsMismatchError: the ranks differ. The text names all values.
    """
    settings = {
        "bucket": context.bucket,
        "step": context.step,
        WAS_RETURNED: context.next_k == RETURNED,
        "pairs at the next step": context.next_k,
    }
    agree(transport, settings, tag=context.tag, what=str(context), advice=STEP_ADVICE)


def _read(message: Tensor) -> dict[str, str]:
    """Returns the settings that fitted into a message. The last one may be cut off."""
    text = bytes(message[_CHECKSUM_BYTES:].tolist()).rstrip(b"\0").decode(errors="replace")
    pairs = (pair.split(_WITHIN_PAIR, 1) for pair in text.split(_BETWEEN_PAIRS))
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}


def _difference(name: str, here: Mapping[str, str], there: Mapping[int, Mapping[str, str]]) -> str:
    """Returns ``"density: 0.01 here, 0.02 on rank 1"``, or an empty text when no difference was read."""
    by_value: dict[str, list[int]] = {}
    for rank, found in there.items():
        value = found.get(name, "nothing")
        if value != here.get(name, "nothing"):
            by_value.setdefault(value, []).append(rank)
    if not by_value:
        return ""
    values = ", ".join(f"{value} on {_named(ranks)}" for value, ranks in by_value.items())
    return f"{name}: {here.get(name, 'nothing')} here, {values}"


def _named(ranks: Sequence[int]) -> str:
    """Returns ``"rank 1"`` or ``"ranks 1, 2"``."""
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
