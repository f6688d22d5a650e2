"""Training under DDP on the GPU, compared bit for bit with the CPU over gloo.

With one rank: over NCCL, over NCCL with every exchange sent (a transport without the short cut for one rank), over gloo.
With ``--ranks 2``: two processes on one GPU over gloo, which stages what it sends in host memory; NCCL refuses two ranks
on one GPU. The gradients are small integers, exact whatever the order of summation, in bfloat16 too: so both devices must
choose the same entries and end with the same bits.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import commhooks
from commhooks import SparseState
from commhooks.transports import Transport
from commhooks.transports.distributed import DistributedTransport
from gpu.programs import place

STEPS = 6
DTYPES = (torch.float32, torch.bfloat16)
SCHEMES: dict[str, Callable[[str | Transport], SparseState]] = {
    "topk": lambda transport: SparseState.topk(0.01, transport),
    "gtopk": lambda transport: SparseState.gtopk(0.01, transport),
    "randomk": lambda transport: SparseState.randomk(0.01, transport),
    "dense": lambda transport: SparseState.dense(transport),
    "4 bits": lambda transport: SparseState.lowbit(4, transport),
    "bfloat16": lambda transport: SparseState.lowbit(16, transport),
}
SENT = "every exchange sent"
Outcome = dict[str, list[Tensor]]  # parameters by scheme and dtype


class EverythingSent(DistributedTransport):
    """No short cut for one rank: collectives go through the library, to itself. Tensors elsewhere are copied."""

    def all_gather(self, send: Tensor, receive: Tensor, *, tag: int, what: str) -> None:
        rows = receive.to(self.device_type)
        self._all_gather(send.to(self.device_type), rows, tag, what)
        receive.copy_(rows)

    def all_reduce(self, buffer: Tensor, *, tag: int, what: str) -> None:
        total = buffer.to(self.device_type)
        self._all_reduce(total, tag, what)
        buffer.copy_(total)


class Model(nn.Module):
    """Parallel linear layers whose loss is linear in the weights, and a layer that does not matter."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(256, 512) for _ in range(6))
        self.unused = nn.Linear(16, 16)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        total = x.new_zeros(())
        for number, layer in enumerate(self.layers):
            weights = (torch.arange(512, device=x.device) * (number + 3) % 17 - 8).to(x.dtype)
            total = total + (layer(x) * weights).sum()
        return total + 0.0 * self.unused(x[:, :16]).sum()


def train(state: SparseState, device: str, dtype: torch.dtype, steps: int) -> list[Tensor]:
    """Parameters after a few steps, on the CPU."""
    model = Model().to(device, dtype)
    wrapped = DistributedDataParallel(model, device_ids=[0] if device == "cuda" else None, bucket_cap_mb=1)
    commhooks.register(wrapped, state)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=2.0**-6)
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    for _ in range(steps):
        batch = torch.randint(-3, 4, (8, 256), generator=generator).to(device, dtype)
        optimizer.zero_grad()
        wrapped(batch).backward()
        optimizer.step()
    state.close()
    return [parameter.detach().cpu() for parameter in model.parameters()]


def train_all(
    backend: str, device: str, store: str, steps: int, rank: int = 0, world_size: int = 1
) -> Outcome:
    """Every scheme and dtype, in a process group of its own; backend ``"nccl, every exchange sent"`` for instance."""
    library, _, sent = backend.partition(", ")
    dist.init_process_group(
        library,
        store=dist.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    results = {}
    for scheme, make in SCHEMES.items():
        for dtype in DTYPES:
            case = f"{scheme}, {str(dtype).removeprefix('torch.')}"
            place.step(f"{case} over {backend} on {device}, rank {rank}")
            transport: Any = EverythingSent(backend=library, timeout_s=30) if sent else "distributed"
            results[case] = train(make(transport), device, dtype, steps)
    dist.destroy_process_group()
    return results


def compare(got: Outcome, want: Outcome, what: str) -> None:
    """SystemExit unless all parameters have the same bits, and were trained at all."""
    for case, theirs in want.items():
        if not any(bool(parameter.any()) for parameter in theirs):
            raise SystemExit(f"{case} over {what}: nothing was trained")
        for ours, parameter in zip(got[case], theirs, strict=True):
            if not torch.equal(ours, parameter):
                worst = float((ours.float() - parameter.float()).abs().max())
                raise SystemExit(f"{case} over {what}: differs from the CPU, by up to {worst}")


def one_rank(here: place.Place, folder: str, steps: int) -> None:
    want = train_all("gloo", "cpu", f"{folder}/cpu", steps)
    for backend in here.pick(("nccl", f"nccl, {SENT}", "gloo"), (f"gloo, {SENT}",)):
        store = f"{folder}/{backend.replace(', ', '-')}"
        compare(train_all(backend, here.device, store, steps), want, backend)
        print(f"over {backend}: {', '.join(want)}: the same bits on {here.device} and CPU")


def rank_main(rank: int, world_size: int, device: str, folder: str, steps: int) -> None:
    """One of several processes on one GPU."""
    if device == "cuda":
        torch.cuda.set_device(0)
    want = train_all("gloo", "cpu", f"{folder}/cpu", steps, rank, world_size)
    got = train_all("gloo", device, f"{folder}/gpu", steps, rank, world_size)
    compare(got, want, f"gloo, rank {rank}")


def main() -> None:
    here, options = place.begin(
        __doc__ or "", lambda parser: parser.add_argument("--ranks", type=int, default=1)
    )
    steps = here.pick(STEPS, 2)
    with tempfile.TemporaryDirectory() as folder:
        if options.ranks == 1:
            one_rank(here, folder, steps)
        else:
            arguments = (options.ranks, here.device, folder, steps)
            torch.multiprocessing.spawn(rank_main, arguments, nprocs=options.ranks)
    print(
        f"{len(SCHEMES) * len(DTYPES)} cases, {steps} steps, {options.ranks} rank(s) on one device: the CPU's bits"
    )


if __name__ == "__main__":
    main()
