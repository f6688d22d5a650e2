"""Before any data: do all ranks mean the same exchange? A fixed-size all-gather answers, so it cannot hang on
sizes."""

from __future__ import annotations

import zlib

import torch

from ..errors import SettingsMismatchError
from ..transports import Transport

_TEXT_BYTES = 488
_SIZES = 5
_DIGEST_BYTES = 8 * _SIZES + _TEXT_BYTES


def check_agreement(
    transport: Transport, *, bucket: int, numel: int, k: int, settings: str, step: int, tag: int
) -> None:
    """Compares the bucket's number, size, k and step and the settings over all ranks.

    Args:
        transport: the open transport.
        bucket: the bucket's index.
        numel: its number of elements.
        k: pairs to be sent at this step.
        settings: one line; compared by checksum; its first 488 bytes are shown.
        step: exchanges so far.
        tag: message tag.

    Raises:
        SettingsMismatchError: two ranks differ; raised on every rank, with both ranks and values.
    """
    sizes = torch.tensor([bucket, numel, k, step, zlib.crc32(settings.encode())], dtype=torch.int64)
    text = torch.zeros(_TEXT_BYTES, dtype=torch.uint8)
    encoded = settings.encode()[:_TEXT_BYTES]
    text[: len(encoded)] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
    mine = torch.cat((sizes.view(torch.uint8), text))
    everyone = mine.new_empty((transport.world_size, _DIGEST_BYTES))
    transport.all_gather(mine, everyone, tag=tag, what=f"bucket {bucket}, agreement on settings")
    for rank in range(1, transport.world_size):
        if not torch.equal(everyone[rank], everyone[0]):
            raise SettingsMismatchError(
                f"rank 0 has {_readable(everyone[0])}, but rank {rank} has {_readable(everyone[rank])}"
            )


def _readable(digest: torch.Tensor) -> str:
    bucket, numel, k, step, _ = digest[: 8 * _SIZES].clone().view(torch.int64).tolist()
    text = bytes(digest[8 * _SIZES :].tolist()).rstrip(b"\0").decode(errors="replace")
    return f"bucket {bucket} of {numel} elements, k {k}, step {step}, settings [{text}]"
