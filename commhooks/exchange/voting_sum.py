"""An all-reduce with one more element, which carries the vote and detects ranks that are out of step."""

from __future__ import annotations

import math

from torch import Tensor

from ..errors import SettingsMismatchError
from ..transports import Transport
from ..wire.message import Context

_STAMPS = 4093  # a prime; the sum of up to 4096 smaller numbers is exact in float32


def summed(transport: Transport, values: Tensor, nonfinite: bool, context: Context) -> tuple[Tensor, bool]:
    """Sums ``values`` over ranks. The host waits for the device.

    The appended element is Inf for the vote, else a number that depends on bucket and step (the stamp).

    Args:
        transport: connects the ranks.
        values: shape ``(n,)``, float32. Only read.
        nonfinite: this rank's vote.
        context: which exchange this is.

    Returns:
        The sum, shape ``(n,)``, in new memory, and whether any rank voted non-finite.

    Raises:
        SettingsMismatchError: the ranks summed different buckets or steps. With more than two ranks a rank
            may miss the difference; it gets an error once the others have failed.
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
            f"rank {transport.rank}, {context}: the other ranks are at another bucket or step (sum of stamps "
            f"{total:g}, expected {stamp * transport.world_size})"
        )
    return buffer[:-1], False
