"""select_topk, select_threshold and select_indices on one gradient, in the steady state of error feedback."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from commhooks.native import abi, ops, reference
from commhooks.native.fused import Fused, Selected

from ..harness.records import Record
from .data import Gradients, RealRun
from .timing import Bench, Call

_CHECKED = 6_550_000  # elements, which the reference manages in seconds


def measure(bench: Bench, data: str, numel: int, density: float, run: RealRun | None) -> None:
    """select_topk on any data; the other two, and torch's operators, on gaussian data only."""
    gradients = Gradients(data, numel, run)
    grad, k = gradients.buffer, max(1, int(numel * density))
    residual, plain, other = torch.zeros(numel), torch.zeros(numel), torch.zeros(numel)
    fused = Fused(grad, residual)
    labels = {"data": data if run is None else run.name, "numel": numel, "density": density}
    misses: list[int] = []

    def topk() -> None:
        misses.append(int(ops.select_topk(fused, k, seed=len(misses), threads=bench.threads).report[2]))

    small_k = max(1, int(min(numel, _CHECKED) * density))
    check(
        lambda f: ops.select_topk(f, small_k, threads=bench.threads),
        lambda f: reference.select_topk(f, small_k),
        grad,
    )
    for _ in range(3):
        topk()
    baselines: dict[str, Call] = {"r+=g": lambda: plain.add_(grad)}
    if data == "gaussian":
        baselines["torch"] = lambda: torch_pipeline(grad, other, k)
    bench.compare({"kernel": "select_topk", **labels}, topk, baselines, between=gradients.next)
    hit = {"kernel": "select_topk", **labels, "metric": "hit_rate", "unit": "1"}
    bench.add(hit, sum(m == 0 for m in misses) / len(misses))
    if data == "gaussian":
        _others(bench, labels, fused, {"r+=g": baselines["r+=g"]})


def _others(bench: Bench, labels: Record, fused: Fused, baselines: dict[str, Call]) -> None:
    """select_threshold and select_indices."""
    numel, density = labels["numel"], labels["density"]
    k, small_k = max(1, int(numel * density)), max(1, int(min(numel, _CHECKED) * density))
    threshold = ops.sample_threshold(fused, k)
    check(
        lambda f: ops.select_threshold(f, threshold, small_k, threads=bench.threads),
        lambda f: reference.select_threshold(f, threshold, small_k),
        fused.grad,
    )
    bench.compare(
        {"kernel": "select_threshold", **labels},
        lambda: ops.select_threshold(fused, threshold, k, threads=bench.threads),
        baselines,
    )
    indices = ops.random_indices(0, 0, 0, numel, k)
    small = indices[indices < min(numel, _CHECKED)]
    check(
        lambda f: ops.select_indices(f, small, threads=bench.threads),
        lambda f: reference.select_indices(f, small),
        fused.grad,
    )
    bench.compare(
        {"kernel": "select_indices", **labels},
        lambda: ops.select_indices(fused, indices, threads=bench.threads),
        baselines,
    )


def measure_misses(bench: Bench, numel: int, density: float) -> None:
    """select_topk on a gradient whose guess must fail: all magnitudes but k / 2 are equal.

    Raises:
        AssertionError: the guess held.
    """
    if abi.cpu() is None:
        print("# select_topk, missed: not measured, the torch operators guess nothing")
        return
    grad = torch.full((numel,), 1e-3)
    k = max(1, int(numel * density))
    grad[:: 2 * numel // k] = 1.0
    residual, plain = torch.zeros(numel), torch.zeros(numel)
    fused = Fused(grad, residual)

    def missed() -> None:
        if int(ops.select_topk(fused, k, threads=bench.threads).report[2]) == 0:
            raise AssertionError("the guess held where it was meant to fail")

    labels = {"kernel": "select_topk", "data": "missed", "numel": numel, "density": density}
    bench.compare(labels, missed, {"r+=g": lambda: plain.add_(grad)}, between=residual.zero_)


def measure_apart(bench: Bench, numel: int, density: float, momentum: float) -> None:
    """select_topk that writes the new memory apart, as `undoable=True` does, over the same in place.

    The new memory is the old one of the next call: the buffers change places, as in a training loop.

    Raises:
        AssertionError: the two memories differ.
    """
    gradients = Gradients("gaussian", numel, None)
    k = max(1, int(numel * density))
    in_place, *places = (_memory(numel, momentum) for _ in range(3))

    def kept() -> None:
        ops.select_topk(Fused(gradients.buffer, *in_place, momentum), k, threads=bench.threads)

    def apart() -> None:
        (residual, velocity), (new_residual, new_velocity) = places
        fused = Fused(gradients.buffer, residual, velocity, momentum)
        fused = replace(fused, residual_out=new_residual, velocity_out=new_velocity)
        ops.select_topk(fused, k, threads=bench.threads)
        places.reverse()

    for _ in range(3):
        gradients.next()
        kept()
        apart()
    if not torch.equal(places[0][0], in_place[0]):
        raise AssertionError("a memory that is written apart differs from one that is updated in place")
    kernel = "select_topk, apart, velocity" if momentum else "select_topk, apart"
    labels = {"kernel": kernel, "data": "gaussian", "numel": numel, "density": density}
    bench.compare(labels, apart, {"in place": kept}, between=gradients.next)


def _memory(numel: int, momentum: float) -> tuple[Tensor, Tensor | None]:
    return torch.zeros(numel), torch.zeros(numel) if momentum else None


def torch_pipeline(grad: Tensor, residual: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What select_topk replaces: add_, abs, topk, gather, scatter."""
    residual.add_(grad)
    indices = residual.abs().topk(k, sorted=False).indices
    values = residual.gather(0, indices)
    residual.scatter_(0, indices, 0.0)
    return values, indices


def check(call: Callable[[Fused], Selected], oracle: Callable[[Fused], Selected], grad: Tensor) -> None:
    """Compares all bits of a kernel with its reference on up to 6.55M elements.

    Raises:
        AssertionError: they differ.
    """
    part = grad[:_CHECKED].clone()
    memories = [
        torch.randn(part.numel(), generator=torch.Generator().manual_seed(1)) * part.std() for _ in "ab"
    ]
    got, want = call(Fused(part, memories[0])), oracle(Fused(part, memories[1]))
    same = torch.equal(got.indices, want.indices) and torch.equal(got.values, want.values)
    if not (same and torch.equal(*memories)):
        raise AssertionError("a kernel disagrees with its reference")
