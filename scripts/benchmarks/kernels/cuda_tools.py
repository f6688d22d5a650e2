"""What the CUDA benchmark stands on: the clock of the device, operands in rotation, and CUB as a rival."""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from commhooks.native.fused import Fused

from .data import RealRun, heavy, tiled

ROTATE_BYTES = 256 * 2**20  # well beyond the cache of any device
MOMENTUM = 0.9
CLUSTER = 500  # clustered: one part in 500 of a bucket is a hundred times larger, as an embedding's gradient
#: Sizes of parameters, over and over: convolutions with their scales and shifts, as in ResNet-50.
_PARAMETERS = (589_824, 256, 256, 262_144, 1024, 1024)
Turn = Callable[[int], object]
#: Median milliseconds of ``call(turn)``; the second function runs before each call and is not timed.
Timer = Callable[[Turn, Turn, int], float]


def nothing(turn: int) -> None:
    """For a timer, when nothing is to be done between calls."""


def device_ms(call: Turn, between: Turn, repeats: int) -> float:
    """Milliseconds on the device, by events around the call, behind a kernel that keeps the device busy."""
    for turn in range(3):
        between(turn)
        call(turn)
    times = []
    for turn in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        between(turn)
        torch.cuda._sleep(2_000_000)  # about a millisecond, in which Python enqueues the call
        begin.record()
        call(turn)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def segments_of(numel: int, device: str) -> Tensor:
    """Offsets ``(s + 1,)`` int64 of parameters that fill a bucket of ``numel`` elements."""
    offsets = [0]
    while offsets[-1] < numel:
        offsets.append(min(numel, offsets[-1] + _PARAMETERS[(len(offsets) - 1) % len(_PARAMETERS)]))
    return torch.tensor(offsets, dtype=torch.int64, device=device)


@dataclass(frozen=True)
class Operands:
    """Gradients, residuals and perhaps velocities, used in turn so that none is in the device's cache."""

    gradients: list[Tensor]
    residuals: list[Tensor]
    velocities: list[Tensor] | None = None
    segments: Tensor | None = None

    @classmethod
    def make(cls, kind: str, numel: int, device: str, run: RealRun | None = None) -> Operands:
        """Gaussian, clustered, heavy-tailed or real (of ``run``) gradients in float32, and zero residuals."""
        count = max(2, min(16, -(-ROTATE_BYTES // (8 * numel))))
        generator = torch.Generator(device).manual_seed(numel)
        gradients = [torch.empty(numel, device=device) for _ in range(count)]
        for turn, gradient in enumerate(gradients):
            if run is not None:
                tiled(run.gradients[turn % len(run.gradients)].to(device), gradient)
            elif kind == "heavy":
                heavy(gradient, generator)
            elif kind == "clustered":
                gradient.normal_(0, 0.01, generator=generator)
                gradient[numel // 2 : numel // 2 + max(1, numel // CLUSTER)] *= 100.0
            else:
                gradient.normal_(0, 0.01, generator=generator)
        return cls(gradients, [torch.zeros(numel, device=device) for _ in range(count)])

    @property
    def count(self) -> int:
        return len(self.gradients)

    def fused(self, turn: int) -> Fused:
        """The operands of one call."""
        here = turn % self.count
        if self.velocities is None:
            return Fused(self.gradients[here], self.residuals[here], segments=self.segments)
        velocity = self.velocities[here]
        return Fused(self.gradients[here], self.residuals[here], velocity, MOMENTUM, segments=self.segments)

    def clear(self) -> None:
        """Residuals and velocities as at the beginning of a training."""
        for tensor in (*self.residuals, *(self.velocities or ())):
            tensor.zero_()


class Cub:
    """``cub_rival.cu``: ``r += g``, DeviceTopK, taking out. Scratch memory is made once per size."""

    def __init__(self, path: Path) -> None:
        self.call = ctypes.CDLL(str(path)).cub_rival
        pointer = ctypes.c_void_p
        self.call.argtypes = [pointer, pointer, ctypes.c_int64, ctypes.c_int64, *[pointer] * 6]
        self._scratch: dict[tuple[int, int], Tensor] = {}

    def run(self, gradient: Tensor, residual: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Values ``(k,)`` float32, indices ``(k,)`` int32, in any order; the residual is updated in place."""
        device, sizes = gradient.device, (gradient.numel(), k)
        keys = torch.empty(k, dtype=torch.int32, device=device)
        values, indices = torch.empty(k, device=device), torch.empty(k, dtype=torch.int32, device=device)
        arrays = (gradient.data_ptr(), residual.data_ptr(), *sizes)
        arrays += (keys.data_ptr(), values.data_ptr(), indices.data_ptr())
        stream = torch.cuda.current_stream(device).cuda_stream
        kept = self._scratch.get(sizes)
        size = ctypes.c_size_t(0 if kept is None else kept.numel())
        if kept is None:
            self._checked(*arrays, None, ctypes.addressof(size), stream)
            kept = self._scratch[sizes] = torch.empty(size.value, dtype=torch.uint8, device=device)
        self._checked(*arrays, kept.data_ptr(), ctypes.addressof(size), stream)
        return values, indices

    def _checked(self, *arguments: object) -> None:
        status = self.call(*arguments)
        if status != 0:
            raise RuntimeError(f"cub_rival: CUDA error {status}")
