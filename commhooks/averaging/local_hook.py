"""DDP communication hooks for local steps: no reduction of gradients, or none from some step on.

(No ``from __future__ import annotations`` here: DDP inspects the annotations of hooks.)
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.futures import Future

from ..ddp.optimizer_steps import listen
from ..errors import says_what_to_write
from .averager import Averager

logger = logging.getLogger(__name__)


def local_hook(state: object, bucket: dist.GradBucket) -> Future[torch.Tensor]:  # type: ignore[name-defined]
    """Leaves gradients local: DDP sends nothing. For a DDP model whose parameters an averager averages.

    Make the model with ``DistributedDataParallel(..., forward_sync_buffers=False)``, before torch 2.13
    ``broadcast_buffers=False``: otherwise DDP sends rank 0's buffers at every forward pass all the same.

    Args:
        state: not used (None).
        bucket: DDP's bucket.

    Returns:
        A completed future with the bucket's own buffer, unchanged.

    Example::

        ddp.register_comm_hook(None, local_hook)
        averager = LocalSGD(period=8, module=ddp.module)
    """
    future: Future[torch.Tensor] = Future()
    future.set_result(bucket.buffer())
    return future


class PostLocalState:
    """Post-local SGD: reduces gradients by another hook for ``start`` steps, then leaves them local.

    It is used with ``LocalSGD(period=Every(period, start=start))``, which averages nothing up to the same
    step. Give that averager here: hook and averager then count the same steps.

    Without an averager the state counts the steps of torch optimizers that hold the model's parameters. Any
    other change of the parameters in place counts as a step too, and is seen at the next backward pass.
    Several backward passes between two steps (accumulation without ``no_sync``) are one step. A step that a
    GradScaler skips is not seen, so gradients are reduced for one step more.

    The last step of a sparse hook is sent densely, together with the whole residual: no later step would read
    the memory. What could not be sent (the step was thrown away, a parameter had no gradient) is logged with
    its norm. The momentum of an ``ErrorFeedback(momentum=...)`` is not handed on.

    Args:
        start: optimizer steps with reduced gradients.
        hook: the hook of those steps, such as ``sparse_hook``. None: DDP's plain average.
        hook_state: the hook's state: a process group (None: the default one), or a ``SparseState``.
        averager: the averager of the local steps, whose step count is used.

    Attributes:
        local: whether the gradients of the last backward pass stayed local.

    Raises:
        ValueError: ``start`` is not an integer of at least 0.
        TypeError: ``averager`` counts no steps.
    """

    @says_what_to_write
    def __init__(
        self,
        start: int,
        hook: Callable[..., Any] | None = None,
        hook_state: Any = None,
        averager: Averager | None = None,
    ) -> None:
        if not isinstance(start, int) or start < 0:
            raise ValueError(f"start must be an integer of at least 0, got {start!r}")
        if averager is not None and not isinstance(getattr(averager, "step", None), int):
            raise TypeError(f"averager must be an averager with a step count, got {type(averager).__name__}")
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        self.start, self.hook, self.hook_state = start, hook or allreduce_hook, hook_state
        self.averager, self.local = averager, False
        self._steps = self._passes = 0  # optimizer steps before the last backward pass; passes since one
        self._seen: list[tuple[torch.Tensor, int]] = []  # parameters and their versions at that pass
        self._stepped = False  # an optimizer of them has stepped since
        self._reducer: Any = getattr(hook_state, "reducer", None)
        self._handing_over = False
        if averager is None:
            listen(self)  # fused optimizers change no parameter's version

    @property
    def step(self) -> int:
        """Optimizer steps so far. Without an averager the count ends where local steps begin."""
        if self.averager is not None:
            return self.averager.step
        changed = self._stepped or any(p._version != version for p, version in self._seen)
        return self._steps + changed

    def follow(self, bucket: dist.GradBucket) -> bool:  # type: ignore[name-defined]
        """Notes a bucket of a backward pass, and returns whether its gradient stays local.

        :func:`post_local_hook` calls it.
        """
        if bucket.index() == 0:
            step = self.step
            self._warn_of_no_steps(step)
            self._steps, self._seen, self._stepped = step, [], False
            self.local = step >= self.start
            if self.local:
                self._handed_over()
            elif step == self.start - 1:
                self._hand_over()
        if self.averager is None and not self.local:
            self._seen += [(parameter, parameter._version) for parameter in bucket.parameters()]
        return self.local

    def stepped(self, ids: frozenset[int]) -> None:
        """Counts an optimizer's step if these ids of its parameters include one of the last backward pass."""
        self._stepped = self._stepped or any(id(parameter) in ids for parameter, _ in self._seen)

    def _warn_of_no_steps(self, step: int) -> None:
        """Warns when no step is seen for many passes: gradients would be reduced for ever.

        An optimizer that is not torch's and writes through ``parameter.data`` is not seen.
        """
        self._passes = self._passes + 1 if step == self._steps else 0
        if self._passes == _MANY_PASSES and self.averager is None:
            logger.warning(
                "PostLocalState: no optimizer step was seen between %d backward passes, and gradients are "
                "still reduced: give it the averager (averager=...), whose count it then takes",
                _MANY_PASSES,
            )

    def _hand_over(self) -> None:
        """Makes the sparse hook send its whole memory in this pass, the last one before local steps."""
        if self._reducer is not None:
            self._handing_over = True
            self._reducer.send_everything()

    def _handed_over(self) -> None:
        """Logs what is left in the reducer's memory after :meth:`_hand_over`."""
        if not self._handing_over:
            return
        self._handing_over = False
        left = self._reducer.memory.table.residual_norm()
        if left > 0.0:
            logger.warning(
                "step %d: a residual of norm %.3g stays behind as local steps begin", self.step, left
            )

    def state_dict(self) -> dict[str, Any]:
        """Returns step count and the hook state's ``state_dict``. Call it between steps, on every rank.

        With a ``SparseState`` it has the form of an averager's state, and ``average_checkpoints`` joins it.
        """
        if not hasattr(self.hook_state, "state_dict"):
            return {"step": self.step}
        held = self.hook_state.state_dict()
        place = {name: held[name] for name in ("rank", "world_size")}
        return {"step": self.step, "synchronisations": 0, **place, "shared": {}, "reducers": [held]}

    def load_state_dict(self, state: dict[str, Any], *, strict: bool = True) -> None:
        """Continues a saved count, and the state of the hook.

        Args:
            state: what this rank's :meth:`state_dict` gave at this world size, or what
                ``average_checkpoints`` made of all ranks'.
            strict: of the hook state's ``load_state_dict``.

        Raises:
            ValueError: the hook's states are of another rank or world size, or the hook has no state for
                them.
        """
        held = state.get("reducers")
        loads = hasattr(self.hook_state, "load_state_dict")
        if held is not None and not loads:
            raise ValueError(
                f"the checkpoint holds the state of a sparse hook, got hook_state={self.hook_state!r}"
            )
        if held is not None:
            options = {} if strict else {"strict": False}
            self.hook_state.load_state_dict(held if state["rank"] is None else held[0], **options)
        elif loads:
            logger.warning(
                "PostLocalState: the checkpoint holds no residuals: those of its hook are kept as they are"
            )
        self._handing_over = False
        self._steps, self._passes, self._seen, self._stepped = int(state["step"]), 0, [], False

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_steps": self.step, "_seen": [], "_stepped": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.averager is None:
            listen(self)


_MANY_PASSES = 128
"""Backward passes without a step after which a warning is logged: no accumulation is that long."""


def post_local_hook(
    state: PostLocalState,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> Future[torch.Tensor]:
    """Runs ``state.hook`` for ``state.start`` optimizer steps, :func:`local_hook` after them."""
    return local_hook(None, bucket) if state.follow(bucket) else state.hook(state.hook_state, bucket)
