"""Every NCCL call of the distributed transport on one GPU: the rank exchanges with itself.

With one rank the transport's public calls take a short cut and send nothing; here they do not. Each exchange follows a
kernel that keeps the stream busy before the operands are written, so a missing order between streams shows as wrong
values. In a dry run the same calls go through ranks as threads.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from commhooks.transports import in_process
from commhooks.transports.base import Transport
from commhooks.transports.distributed import DistributedTransport
from gpu.programs import place

SIZES = (4, 4 + 2 * 6554, 1 << 22)  # a header alone, a message of 6554 pairs, a dense bucket


class ToItself(Transport):
    """The three calls without the short cut for one rank."""

    def round_trips(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What ``x`` (int32) becomes by an all-gather, an exchange with itself, and an all-reduce in float32."""
        rows, received, total = x.new_zeros(1, x.numel()), torch.zeros_like(x), x.float()
        self._all_gather(x, rows, 0, "gather")
        self.move([(0, x)], [(0, received)], 0, "self")
        self._all_reduce(total, 0, "reduce")
        return rows[0], received, total


class OverNccl(ToItself, DistributedTransport):
    """On a GPU."""


class OverThreads(ToItself, in_process.InProcessTransport):
    """In a dry run."""


def connect(here: place.Place) -> ToItself:
    if here.dry:
        (transport,) = in_process.group(1)
        transport.__class__ = OverThreads
        assert isinstance(transport, OverThreads)
        return transport
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    return OverNccl(backend="nccl", timeout_s=30)


def main() -> None:
    here, _ = place.begin(__doc__ or "")
    transport = connect(here)
    side = None if here.dry else torch.cuda.Stream()
    with torch.cuda.stream(side):
        for numel in SIZES:
            place.step(f"{numel} elements")
            here.busy(50_000_000)  # the producer of x is late on this stream
            x = torch.arange(numel, dtype=torch.int32, device=here.device)
            for name, got in zip(
                ("all-gather", "exchange", "all-reduce"), transport.round_trips(x), strict=True
            ):
                if not torch.equal(got.to(torch.int32), x):
                    raise SystemExit(
                        f"{name} of {numel} elements over {type(transport).__name__}: wrong values"
                    )
    transport.close()
    if dist.is_initialized():
        dist.destroy_process_group()
    print(f"all-gather, exchange and all-reduce of {', '.join(map(str, SIZES))} elements with itself: right")


if __name__ == "__main__":
    main()
