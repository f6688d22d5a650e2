"""The Horovod adapter with gradients on the GPU, one rank, compared bit for bit with the CPU.

Horovod itself is a stand-in (:mod:`gpu.programs.fake_horovod`): this shows that selection, messages, staging and hand-back
of both ways in work on a device, not that Horovod's own CUDA operations do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gpu.programs import fake_horovod, place

STEPS = 4


def model_on(device: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 32)).to(device)


def gradient(parameter: Tensor, number: int, step: int) -> Tensor:
    """Made on the CPU: only what the adapter does may differ between devices."""
    generator = torch.Generator().manual_seed(100 * step + number)
    return torch.randn(parameter.shape, generator=generator).to(parameter.device)


def stock(hvd: Any, make: Callable[[Any], Any], device: str) -> list[Tensor]:
    """What Horovod's own optimizer does with a compression: gradients as they come, then ``synchronize``."""
    model = model_on(device)
    compression = make(list(model.named_parameters()))
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0**-4)
    for step in range(STEPS):
        handles = []
        for number, p in enumerate(model.parameters()):
            p.grad = gradient(p, number, step)
            compressed, context = compression.compress(p.grad)
            handles.append((p, hvd.allreduce_async_(compressed), context))
        for p, handle, context in handles:
            p.grad = compression.decompress(hvd.synchronize(handle), context)
        optimizer.step()
    return [p.detach().cpu() for p in model.parameters()]


def ours(make: Callable[[], Any], device: str) -> list[Tensor]:
    """Our optimizer: a loss whose gradients are the given ones."""
    from commhooks.horovod import DistributedOptimizer

    model = model_on(device)
    plain = torch.optim.SGD(model.parameters(), lr=2.0**-4)
    optimizer = DistributedOptimizer(plain, model.named_parameters(), state=make(), bucket_cap_mb=0.05)
    for step in range(STEPS):
        optimizer.zero_grad()
        pairs = enumerate(model.parameters())
        torch.stack([(p * gradient(p, number, step)).sum() for number, p in pairs]).sum().backward()
        optimizer.step()
    result = [p.detach().cpu() for p in model.parameters()]
    optimizer.close()
    return result


def main() -> None:
    here, _ = place.begin(__doc__ or "")
    hvd = fake_horovod.install()
    from commhooks import SparseState
    from commhooks.horovod import Compression

    ways: dict[str, Callable[[str], list[Tensor]]] = {
        "Compression.topk": lambda device: stock(hvd, lambda named: Compression.topk(0.05, named), device),
        "Compression.randomk": lambda device: stock(
            hvd, lambda named: Compression.randomk(0.05, named), device
        ),
        "DistributedOptimizer, top-k": lambda device: ours(lambda: SparseState.topk(0.05), device),
        "DistributedOptimizer, gTop-k": lambda device: ours(lambda: SparseState.gtopk(0.05), device),
    }
    start = [p.detach() for p in model_on("cpu").parameters()]
    for name, train in ways.items():
        place.step(name)
        got, want = train(here.device), train("cpu")
        if all(torch.equal(a, b) for a, b in zip(want, start, strict=True)):
            raise SystemExit(f"{name}: nothing was trained")
        if not all(torch.equal(a, b) for a, b in zip(got, want, strict=True)):
            raise SystemExit(f"{name}: GPU and CPU differ after {STEPS} steps")
    if dist.is_initialized():
        dist.destroy_process_group()
    print(f"{', '.join(ways)}: the CPU's bits, Horovod being a stand-in")


if __name__ == "__main__":
    main()
