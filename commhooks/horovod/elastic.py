"""Elastic Horovod: ``hvd.elastic.TorchState`` commits, restores and synchronises our objects like its own."""

from __future__ import annotations

import copy
import importlib
from typing import Any

from .api import horovod
from .compression import SparseCompressor
from .optimizer import SparseOptimizer

_elastic = importlib.import_module("horovod.torch.elastic.state")


class SparseOptimizerHandler(_elastic.OptimizerStateHandler):  # type: ignore[misc,name-defined]
    """Commits, restores and synchronises our optimizer: each rank keeps its own residuals.

    Commit and restore include the residuals. Sync does not change them. A new worker starts with an empty
    residual and takes the step count from rank 0, since warm-up and masks depend on it.

    Raises:
        ValueError: the optimizer serves a process set that lacks some ranks.
    """

    def __init__(self, optimizer: Any) -> None:
        _check_all_ranks(optimizer.gradient_sync and optimizer.gradient_sync.process_set)
        super().__init__(optimizer)

    def restore(self) -> None:
        """Goes back to the commit. It does not communicate, since a lost peer may be the reason."""
        saved = dict(self._saved_optimizer_state)
        residuals = saved.pop("commhooks")
        self.value.load_state_dict(saved)
        self.value.gradient_sync.rewind(residuals)

    def sync(self) -> None:
        """Does as Horovod's handler, opens the transport anew, takes rank 0's step, and saves."""
        super().sync()
        sync = self.value.gradient_sync
        sync.reset()
        sync.open()
        step = horovod().broadcast_object(sync.state.reducer.step, root_rank=0, name="commhooks.step")
        sync.rewind({**sync.state.state_dict(), "step": step})
        self.save()


class CompressorHandler(_elastic.StateHandler):  # type: ignore[misc,name-defined]
    """Does the same for a compression object, given as ``TorchState(..., compression=compression)``."""

    def __init__(self, value: Any) -> None:
        _check_all_ranks(value.core.process_set)
        super().__init__(value)
        self.save()

    def save(self) -> None:
        """Keeps a copy of the state: residuals and steps."""
        self._saved = copy.deepcopy(self.value.state_dict())

    def restore(self) -> None:
        """Goes back to the copy."""
        self.value.load_state_dict(self._saved)

    def sync(self) -> None:
        """Takes rank 0's numbers of steps, and saves. Residuals stay as they are."""
        core = self.value.core
        core.finish_step()
        core.load_steps(horovod().broadcast_object(core.steps(), root_rank=0, name="commhooks.steps"))
        self.save()


def _check_all_ranks(process_set: Any) -> None:
    """Raises ``ValueError`` unless the process set holds all ranks.

    Handlers communicate with all ranks, and Horovod forgets process sets when it resets. The check needs no
    communication, so every rank refuses by itself.
    """
    size = horovod().size()
    if process_set is None or len(process_set.ranks) < size:
        found = "one without this rank" if process_set is None else list(process_set.ranks)
        raise ValueError(f"process_set must hold all {size} ranks in an elastic State, got {found}")


def register_handlers() -> None:
    """Makes ``hvd.elastic.TorchState`` use our handlers, which must precede its handler of all optimizers."""
    registry = list(_elastic.get_handler_registry())
    ours = [(SparseOptimizer, SparseOptimizerHandler), (SparseCompressor, CompressorHandler)]
    _elastic.set_handler_registry(ours + [pair for pair in registry if pair not in ours])
