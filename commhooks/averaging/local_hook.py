"""DDP communication hooks for local steps: none, or none from a step on.

(No ``from __future__ import annotations`` here: DDP inspects the annotations of hooks.)
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.futures import Future


def local_hook(state: object, bucket: dist.GradBucket) -> Future[torch.Tensor]:  # type: ignore[name-defined]
    """Leaves gradients local: DDP sends nothing. For a DDP model whose parameters an averager averages.

    Make the model with ``DistributedDataParallel(..., broadcast_buffers=False)``: otherwise DDP sends rank
    0's buffers at every forward pass all the same.

    Args:
        state: not used (None).
        bucket: DDP's bucket.

    Returns:
        A completed future with the bucket's own buffer.

    Example::

        ddp.register_comm_hook(None, local_hook)
        averager = LocalSGD(sync=8, module=ddp.module)
    """
    future: Future[torch.Tensor] = Future()
    future.set_result(bucket.buffer())
    return future


class PostLocalState:
    """Reduces gradients by another hook up to step ``start``, then leaves them local (post-local SGD).

    Goes with ``LocalSGD(sync=Every(period, start=start))``, which leaves the model alone up to the same step.

    Args:
        start: optimizer steps with reduced gradients.
        hook: the hook of those steps; default: DDP's plain average. commhooks' ``sparse_hook`` does as well.
        hook_state: its state: a process group (None: the default one), or a ``SparseState``.

    Raises:
        ValueError: ``start`` is not an integer of at least 0.
    """

    def __init__(self, start: int, hook: Callable[..., Any] | None = None, hook_state: Any = None) -> None:
        if not isinstance(start, int) or start < 0:
            raise ValueError(f"start must be an integer of at least 0, got {start!r}")
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        self.start, self.hook, self.hook_state = start, hook or allreduce_hook, hook_state
        self.step = 0

    def state_dict(self) -> dict[str, int]:
        """The step count."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues a saved count."""
        self.step = state["step"]


def post_local_hook(state: PostLocalState, bucket: dist.GradBucket) -> Future[torch.Tensor]:  # type: ignore[name-defined]
    """``state.hook`` up to step ``state.start``, :func:`local_hook` after it. A last bucket is a step."""
    local = state.step >= state.start
    if bucket.is_last():
        state.step += 1
    return local_hook(None, bucket) if local else state.hook(state.hook_state, bucket)
