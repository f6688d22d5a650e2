"""Step time with hook and without, one rank over NCCL: what selection, the worker and its futures cost a real model.

At world size 1 nothing has to be sent, so the difference to plain DDP is the hook's own cost. The tail is the time from
the last gradient to the end of backward, during which only communication is left. Medians over the steps; plain DDP is
measured first and last.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import commhooks
from commhooks import SparseState
from commhooks.gradient import side_stream
from gpu.programs import models, place
from gpu.targets import AGAIN, PLAIN, SCALED

DENSITY, WARM_UP, STEPS = 0.001, 8, 30
EQUAL = "top-k, no priority"  # the hook's stream at the priority of backward's
_PRIORITY = side_stream.PRIORITY
Variant = Callable[[Any], SparseState | None]
VARIANTS: dict[str, tuple[bool, Variant]] = {  # with a GradScaler?, the state
    PLAIN: (False, lambda scaler: None),
    "top-k": (False, lambda scaler: SparseState.topk(DENSITY)),
    "gTop-k": (False, lambda scaler: SparseState.gtopk(DENSITY)),
    "random-k": (False, lambda scaler: SparseState.randomk(DENSITY)),
    "dense": (False, lambda scaler: SparseState.dense()),
    "4 bits": (False, lambda scaler: SparseState.lowbit(4)),
    EQUAL: (False, lambda scaler: SparseState.topk(DENSITY)),
    f"{PLAIN}{SCALED}": (True, lambda scaler: None),
    f"top-k{SCALED}": (True, lambda scaler: SparseState.topk(DENSITY, grad_scaler=scaler)),
    AGAIN: (False, lambda scaler: None),
}


@dataclass
class Job:
    """A model, its input and its targets."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor

    def loss(self, model: nn.Module, device: str) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            out = model(self.inputs)
        return functional.cross_entropy(out.float().flatten(0, -2), self.targets.flatten())


def resnet50(here: place.Place) -> Job:
    """Batch 128, 224 x 224, channels last."""
    model = here.pick(models.ResNet, lambda: models.ResNet((1, 1), 8, 10))().to(here.device)
    batch, size, classes = here.pick((128, 224, 1000), (2, 32, 10))
    inputs = torch.randn(batch, 3, size, size, device=here.device)
    last = torch.channels_last
    targets = torch.randint(classes, (batch,), device=here.device)
    return Job(model.to(memory_format=last), inputs.to(memory_format=last), targets)


def gpt(here: place.Place) -> Job:
    """Eight sequences of 1024 tokens."""
    model = here.pick(models.Gpt, lambda: models.Gpt(2, 32, 2, 16, 50))().to(here.device)
    batch, length, words = here.pick((8, 1024, 50257), (2, 16, 50))
    tokens = torch.randint(words, (batch, length + 1), device=here.device)
    return Job(model, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


JOBS = {"resnet50": resnet50, "gpt": gpt}


def measure(here: place.Place, job: Job, scaled: bool, make: Variant) -> dict[str, Any]:
    """Trains a copy of the model; median milliseconds of a step and of its tail, and the worker's seconds of the last."""
    model = copy.deepcopy(job.model)
    first = next(model.parameters())  # whose gradient comes last
    wrapped = DistributedDataParallel(
        model, device_ids=None if here.dry else [0], gradient_as_bucket_view=True
    )
    scaler = torch.amp.GradScaler(here.device, enabled=scaled)
    state = make(scaler)
    if state is not None:
        commhooks.register(wrapped, state)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=1e-3)
    begins, gradients, ends = [], [], []
    first.register_post_accumulate_grad_hook(lambda _: gradients.append(here.instant()))
    warm_up, steps = here.pick((WARM_UP, STEPS), (1, 2))
    for step in range(warm_up + steps + 1):
        begins.append(here.instant())
        optimizer.zero_grad()
        loss = job.loss(wrapped, here.device)
        scaler.scale(loss).backward()
        ends.append(here.instant())
        scaler.step(optimizer)
        scaler.update()
    here.synchronize()
    if not bool(loss.isfinite()):
        raise SystemExit(f"the loss is {float(loss)}")
    times = [here.ms_between(a, b) for a, b in zip(begins, begins[1:])][warm_up:]
    tails = [here.ms_between(a, b) for a, b in zip(gradients, ends, strict=True)][warm_up:-1]
    result: dict[str, Any] = {"ms": place.median(times), "tail_ms": place.median(tails), "steps": steps}
    if state is not None:
        result["worker_ms"] = {phase: round(1e3 * s, 3) for phase, s in state.stats()["seconds"].items()}
        state.close()
    return result


def main() -> None:
    here, options = place.begin(
        __doc__ or "", lambda parser: parser.add_argument("model", choices=list(JOBS))
    )
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    dist.init_process_group("gloo" if here.dry else "nccl", store=dist.HashStore(), rank=0, world_size=1)
    job = JOBS[options.model](here)
    here.keep("parameters", sum(p.numel() for p in job.model.parameters()))
    for name, (scaled, make) in VARIANTS.items():
        place.step(name)
        side_stream.PRIORITY = 0 if name == EQUAL else _PRIORITY  # each state makes a stream of its own
        result = measure(here, job, scaled, make)
        here.keep(name, result)
        print(f"{options.model}, {name}: {result}")
    dist.destroy_process_group()
    print(f"{options.model}: {', '.join(VARIANTS)}")


if __name__ == "__main__":
    main()
