"""DDP communication hooks for local steps: none, or none from a step on.

(No ``from __future__ import annotations`` here: DDP inspects the annotations of hooks.)
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.futures import Future

logger = logging.getLogger(__name__)


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


def _everything(numel: int, k: int, world_size: int) -> bool:
    return True


class PostLocalState:
    """Reduces gradients by another hook up to step ``start``, then leaves them local (post-local SGD).

    Goes with ``LocalSGD(sync=Every(period, start=start))``, which leaves the model alone up to the same step.
    A sparse hook's last step is sent densely and takes the whole residual along, so that nothing stays behind
    in a memory that no step reads any more. What could not go (the step was thrown away, a parameter had no
    gradient) is logged with its norm. The momentum of an ``ErrorFeedback(momentum=...)`` ends there.

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
        self._reducer: Any = getattr(hook_state, "reducer", None)
        self._crossover: Any = None  # the reducer's own rule while the residual is handed over

    def hand_over(self) -> None:
        """Makes the sparse hook send all it holds in this step; for the last one before local steps."""
        if self._reducer is not None and self._crossover is None:
            self._crossover = self._reducer.dense_crossover
            self._reducer.dense_crossover = _everything

    def handed_over(self) -> None:
        """Afterwards: gives the reducer its rule back and logs what is left in its memory."""
        if self._crossover is None:
            return
        self._reducer.dense_crossover, self._crossover = self._crossover, None
        left = self._reducer.memory.table.residual_norm()
        if left > 0.0:
            logger.warning(
                "step %d: a residual of norm %.3g stays behind as local steps begin", self.step, left
            )

    def state_dict(self) -> dict[str, int]:
        """The step count."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues a saved count."""
        self.step = state["step"]


def post_local_hook(state: PostLocalState, bucket: dist.GradBucket) -> Future[torch.Tensor]:  # type: ignore[name-defined]
    """``state.hook`` up to step ``state.start``, :func:`local_hook` after it. A last bucket is a step."""
    local = state.step >= state.start
    if local:
        state.handed_over()
    elif state.step == state.start - 1:
        state.hand_over()
    if bucket.is_last():
        state.step += 1
    return local_hook(None, bucket) if local else state.hook(state.hook_state, bucket)
