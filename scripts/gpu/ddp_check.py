"""DDP with the hooks on one GPU, over NCCL and over gloo, compared bit for bit with the CPU over gloo. World size 1.

Over gloo what is sent and what comes back is staged between GPU and host (``commhooks/transports/device_copy.py``). The gradients are small integers, exact in float32 whatever the order of summation, so that both devices must choose
the same entries and end with the same bits.
"""

from __future__ import annotations

import sys
import tempfile
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

import commhooks  # noqa: E402

STEPS = 6
SCHEMES = ("topk", "gtopk", "randomk", "dense")
VARIANTS = (("nccl", "cuda"), ("gloo", "cuda"), ("gloo", "cpu"))
"""Backend and device; all must give the bits of the last."""


class Model(nn.Module):
    """Parallel linear layers whose loss is linear in the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(256, 512) for _ in range(6))
        self.unused = nn.Linear(16, 16)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        total = x.new_zeros(())
        for number, layer in enumerate(self.layers):
            weights = (torch.arange(512, device=x.device, dtype=x.dtype) * (number + 3)) % 17 - 8
            total = total + (layer(x) * weights).sum()
        return total + 0.0 * self.unused(x[:, :16]).sum()


def train(scheme: str, device: str) -> list[Tensor]:
    """Parameters after a few steps, on the CPU."""
    model = Model().to(device)
    wrapped = DistributedDataParallel(model, device_ids=[0] if device == "cuda" else None, bucket_cap_mb=1)
    make = getattr(commhooks.SparseState, scheme)
    state = make() if scheme == "dense" else make(0.01)
    commhooks.register(wrapped, state)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=2.0**-6)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        batch = torch.randint(-3, 4, (8, 256), generator=generator).float().to(device)
        optimizer.zero_grad()
        wrapped(batch).backward()
        optimizer.step()
    result = [parameter.detach().cpu() for parameter in model.parameters()]
    state.close()
    return result


def train_all(backend: str, device: str) -> dict[str, list[Tensor]]:
    """Parameters after a few steps by scheme, in a process group of its own."""
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(f"{folder}/store", 1)
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timedelta(seconds=60))
        results = {scheme: train(scheme, device) for scheme in SCHEMES}
        dist.destroy_process_group()
    return results


def main() -> None:
    results = {variant: train_all(*variant) for variant in VARIANTS}
    expected = results[VARIANTS[-1]]
    for backend, device in VARIANTS[:-1]:
        for scheme in SCHEMES:
            pairs = list(zip(results[backend, device][scheme], expected[scheme], strict=True))
            if not any(bool(a.any()) for a, _ in pairs):
                raise SystemExit(f"{scheme} over {backend}: nothing was trained")
            if not all(torch.equal(a, b) for a, b in pairs):
                worst = max(float((a - b).abs().max()) for a, b in pairs)
                raise SystemExit(
                    f"{scheme} over {backend}: GPU and CPU differ after {STEPS} steps, by up to {worst}"
                )
            print(f"{scheme} over {backend}: the same bits on GPU and CPU after {STEPS} steps")


if __name__ == "__main__":
    main()
