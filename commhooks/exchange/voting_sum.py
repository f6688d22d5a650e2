"""An all-reduce with one more element, which carries the vote and detects ranks that are out of step."""

from __future__ import annotations

import math
import zlib

from torch import Tensor

from ..errors import SettingsMismatchError
from ..transports import Transport
from ..wire.message import RETURNED, Context
from .agreement import agree_on_context

_STAMPS = 4093  # a prime, of which 2 is a primitive root; the sum of up to 4096 stamps is exact in float32


def summed(transport: Transport, values: Tensor, nonfinite: bool, context: Context) -> tuple[Tensor, bool]:
    """Sums ``values`` over ranks. The host waits for the device.

    The appended element is Inf for the vote, -Inf from a rank that was reset or loaded since the last step,
    else a number that depends on the context (the stamp). -Inf and Inf make NaN, so that a vote does not hide
    a reset. When a rank was reset, or the stamps differ, the ranks gather their contexts, so that the error
    can name values. Stamps of two steps less than 4,092 apart differ, those of unlike buckets or sizes in all
    but one of 4,092 cases.

    Args:
        transport: connects the ranks.
        values: shape ``(n,)``, float32. Only read.
        nonfinite: this rank's vote.
        context: which exchange this is.

    Returns:
        The sum, shape ``(n,)``, in new memory, and whether any rank voted non-finite.

    Raises:
        SettingsMismatchError: the ranks summed different buckets or steps, or will send different numbers of
            pairs at the next step. With more than two ranks a rank may miss the difference; it gets an error
            once the others have failed.
    """
    was_returned = context.next_k == RETURNED
    sizes = zlib.crc32(repr((context.bucket, context.next_k)).encode())
    stamp = float(pow(2, context.step, _STAMPS) * (1 + sizes % (_STAMPS - 1)) % _STAMPS)
    if was_returned:
        stamp = -math.inf
    buffer = values.new_empty(values.numel() + 1)
    buffer[:-1] = values
    buffer[-1] = math.inf if nonfinite else stamp
    transport.all_reduce(buffer, tag=context.tag, what=str(context))
    total = float(buffer[-1])
    if total == math.inf:
        return buffer[:-1], True
    if was_returned or total != stamp * transport.world_size:
        agree_on_context(transport, context)
        if was_returned:  # on all ranks
            return buffer[:-1], False
        raise SettingsMismatchError(
            f"rank {transport.rank}, {context}: the sum of the ranks' stamps is {total:g} instead of "
            f"{stamp * transport.world_size:g}, though they are at the same bucket and step"
        )
    return buffer[:-1], False
