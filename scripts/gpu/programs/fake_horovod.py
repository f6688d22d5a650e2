"""Stands in for Horovod where it is not installed: one rank, on whose tensors every operation is an identity.

Only what :mod:`commhooks.horovod` uses. Results are copies on the tensor's own device, as Horovod's are.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from torch import Tensor


class _ProcessSet:
    process_set_id, ranks = 0, (0,)

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0

    def included(self) -> bool:
        return True


class _Compressor:
    pass


class _Compression:
    none = _Compressor


class _Handler:
    def __init__(self, value: Any) -> None:
        self.value = value


class _Operations:
    """Asynchronous operations, complete at once; a handle is a number."""

    def __init__(self) -> None:
        self.results: list[Tensor] = []

    def start(self, tensor: Tensor, **options: Any) -> int:
        self.results.append(tensor.clone())
        return len(self.results) - 1

    def synchronize(self, handle: int) -> Tensor:
        return self.results[handle]


def install() -> Any:
    """Puts ``horovod`` into ``sys.modules`` and returns ``horovod.torch``."""
    names = (
        "horovod",
        "horovod.torch",
        "horovod.torch.mpi_ops",
        "horovod.torch.elastic",
        "horovod.torch.elastic.state",
    )
    modules = {name: ModuleType(name) for name in names}
    for name, module in modules.items():
        module.__path__ = []
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    top, hvd, mpi_ops, _, elastic = (vars(module) for module in modules.values())
    operations = _Operations()
    top["__version__"] = "0.28.1"
    mpi_ops["_handle_map"] = {}
    hvd.update(
        Average="average", Sum="sum", Adasum="adasum", HorovodInternalError=RuntimeError, Compression=_Compression,
        compression=_Compression, global_process_set=_ProcessSet(), is_initialized=lambda: True, mpi_enabled=lambda: False,
        rank=lambda: 0, size=lambda: 1, local_size=lambda: 1, poll=lambda handle: True,
        allgather_async=operations.start, allreduce_async_=operations.start, synchronize=operations.synchronize,
        broadcast_object=lambda value, **options: value,
    )  # fmt: skip
    _Compression.Compressor = _Compressor  # type: ignore[attr-defined]
    elastic.update(
        StateHandler=_Handler,
        OptimizerStateHandler=_Handler,
        get_handler_registry=list,
        set_handler_registry=len,
    )
    sys.modules.update(modules)
    return modules["horovod.torch"]
