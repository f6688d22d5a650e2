"""Muon: momentum whose singular values are made about 1 by five Newton-Schulz steps, for matrices only.

The rule of torch.optim.Muon with `adjust_lr_fn="match_rms_adamw"`. That one always computes in bfloat16, which a CPU
without instructions for it does about ten times slower than float32. This one computes in float32 on CPUs, and takes
matrices of one shape together.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_A, _B, _C = 3.4445, -4.7750, 2.0315
_STEPS = 5
_LEAST_NORM = 1e-7


class Muon(torch.optim.Optimizer):
    """`M = mu M + (1 - mu) g; w = (1 - lr decay) w - 0.2 lr sqrt(max(rows, columns)) O((1 - mu) g + mu M)`.

    O is :func:`orthogonalised`. The factor gives the update the size of AdamW's, so that one rate serves both.

    Args:
        params: matrices.
        lr: rate.
        weight_decay: of the matrices, multiplied by the rate.
        momentum: mu, in Nesterov's form.

    Raises:
        ValueError: a parameter that is no matrix.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, weight_decay: float = 0.1, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dim() != 2:
                    raise ValueError(
                        f"Muon takes matrices, got a parameter of shape {tuple(parameter.shape)}"
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; parameters without a gradient stay as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update = self._nesterov(parameter, group["momentum"])
                    wide = update.T if update.shape[0] > update.shape[1] else update
                    alike[wide.shape[0], wide.shape[1]].append((parameter, wide))
            for (_, columns), pairs in alike.items():
                updates = orthogonalised(torch.stack([wide for _, wide in pairs]))
                rate = 0.2 * group["lr"] * math.sqrt(columns)
                for (parameter, _), update in zip(pairs, updates):
                    parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                    turned = update if update.shape == parameter.shape else update.T
                    parameter.add_(turned, alpha=-rate)
        return loss

    def _nesterov(self, parameter: Tensor, momentum: float) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        mean = state["momentum_buffer"].lerp_(parameter.grad, 1.0 - momentum)
        return parameter.grad.lerp(mean, momentum)


def orthogonalised(matrices: Tensor) -> Tensor:
    """Matrices with about the singular vectors of `matrices` and singular values of 0.7 to 1.2.

    Args:
        matrices: shape (count, rows, columns), rows at most columns.

    Returns:
        The same shape; float32 on a CPU, else bfloat16.
    """
    x = matrices.to(torch.float32 if matrices.device.type == "cpu" else torch.bfloat16)
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=_LEAST_NORM)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x
