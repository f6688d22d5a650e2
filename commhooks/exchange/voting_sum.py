"""An all-reduce with one element more, which carries the vote and tells ranks that are out of step."""

from __future__ import annotations

import math

from torch import Tensor

from ..errors import SettingsMismatchError
from ..transports import Transport
from ..wire.message import Context

_STAMPS = 4093  # a prime; sums of up to 4096 such numbers are exact in float32


def summed(transport: Transport, values: Tensor, nonfinite: bool, context: Context) -> tuple[Tensor, bool]:
    """The sum over ranks of ``values`` (n,) float32, in new memory, and whether any rank voted non-finite.

    Raises:
        SettingsMismatchError: the ranks summed different buckets or steps. Of more than two ranks that differ
            some may not see it; they get an error when the others are gone.
    """
    buffer = values.new_empty(values.numel() + 1)
    buffer[:-1] = values
    stamp = (context.step * 31 + context.bucket) % _STAMPS
    buffer[-1] = math.inf if nonfinite else float(stamp)
    transport.all_reduce(buffer, tag=context.tag, what=str(context))
    total = float(buffer[-1])
    if total == math.inf:
        return buffer[:-1], True
    if total != stamp * transport.world_size:
        raise SettingsMismatchError(
            f"rank {transport.rank}, {context}: the other ranks are at another bucket or step "
            f"(sum of stamps {total:g}, expected {stamp * transport.world_size})"
        )
    return buffer[:-1], False
