"""Fused buckets: how parameters are divided among them, and the flat buffers for their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..gradient.memory_order import shaped

_MIB = 1 << 20
_FIRST_CAP_MB = 1.0  # small, as in DDP: communication starts early in backward


class FusedBucket:
    """Gradients of some parameters, one after another in a flat buffer.

    Attributes:
        parameters: in the buffer's order.
        buffer: shape ``(n,)``, the parameters' dtype.
        views: by parameter, its part of the buffer in the parameter's shape and order of memory, as in DDP.
        missing: parameters whose gradient has not arrived yet.
        future: of the exchange. None before it was started.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = tuple(parameters)
        first = self.parameters[0]
        numel = sum(p.numel() for p in self.parameters)
        self.buffer = torch.zeros(numel, dtype=first.dtype, device=first.device)
        self.views: dict[Tensor, Tensor] = {}
        start = 0
        for p in self.parameters:
            self.views[p] = shaped(self.buffer[start : start + p.numel()], p)
            start += p.numel()
        self.missing: set[Tensor] = set(self.parameters)
        self.future: Any = None

    def fill(self, parameter: Tensor) -> None:
        """Copies the parameter's gradient into the buffer, or zeros when it has none."""
        view, grad = self.views[parameter], parameter.grad
        if grad is None:
            view.zero_()
        else:
            view.copy_(grad.to_dense() if grad.is_sparse else grad)
        self.missing.discard(parameter)


def partition(parameters: Sequence[Tensor], bucket_cap_mb: float, groups: Any) -> list[FusedBucket]:
    """Divides parameters into buckets, in the order in which they are exchanged.

    Args:
        parameters: all that require gradients, in the model's order, the same on all ranks.
        bucket_cap_mb: largest size in MiB. The first bucket has at most 1 MiB. A parameter larger than
            that has a bucket of its own.
        groups: None, a number of buckets, or a list of lists of parameters, each a bucket, exchanged in this
            order. Parameters that no list names follow in buckets by size.

    Raises:
        ValueError: ``bucket_cap_mb`` is not positive, or a group holds something else than one of the
            parameters, holds one twice, or mixes dtypes or devices.
    """
    if not bucket_cap_mb > 0:
        raise ValueError(f"bucket_cap_mb must be positive, got {bucket_cap_mb!r}")
    rest = list(reversed(parameters))  # backward reaches the last parameter first
    buckets: list[FusedBucket] = []
    if isinstance(groups, int):
        return [FusedBucket(part) for share in _split(rest, groups) for part in _uniform(share)]
    if groups is not None:
        for group in groups:
            members = list(group)
            known = [p for p in members if any(p is q for q in rest)]
            strangers = [p for p in members if not any(p is q for q in parameters) and _trains(p)]
            if strangers or len(known) < sum(_trains(p) for p in members):
                raise ValueError("groups must list parameters of the optimizer, each at most once")
            if len(list(_uniform(known))) > 1:
                raise ValueError("groups: the parameters of a group must have one dtype and one device")
            if known:
                buckets.append(FusedBucket(known))
                rest = [p for p in rest if not any(p is q for q in known)]
    for part in _uniform(rest):
        buckets.extend(FusedBucket(b) for b in _by_size(part, bucket_cap_mb, first=not buckets))
    return buckets


def _trains(parameter: Any) -> bool:
    if not isinstance(parameter, Tensor):
        raise ValueError(f"groups must hold tensors, got {type(parameter).__name__}")
    return parameter.requires_grad


def _uniform(parameters: Sequence[Tensor]) -> list[list[Tensor]]:
    """Divides the parameters by dtype and device, in order of first appearance."""
    parts: dict[Any, list[Tensor]] = {}
    for p in parameters:
        parts.setdefault((p.dtype, p.device), []).append(p)
    return list(parts.values())


def _by_size(parameters: Sequence[Tensor], bucket_cap_mb: float, first: bool) -> list[list[Tensor]]:
    result: list[list[Tensor]] = []
    size, cap = 0.0, min(_FIRST_CAP_MB, bucket_cap_mb) if first else bucket_cap_mb
    for p in parameters:
        mib = p.numel() * p.element_size() / _MIB
        if not result or size + mib > cap:
            if result:
                cap = bucket_cap_mb
            result.append([])
            size = 0.0
        result[-1].append(p)
        size += mib
    return result


def _split(parameters: list[Tensor], count: int) -> list[list[Tensor]]:
    if count < 1:
        raise ValueError(f"groups must be at least 1, got {count}")
    share, extra = divmod(len(parameters), min(count, len(parameters)) or 1)
    result, start = [], 0
    for i in range(min(count, len(parameters))):
        end = start + share + (i < extra)
        result.append(parameters[start:end])
        start = end
    return result
