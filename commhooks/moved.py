"""Keeps the module paths of version 0.1 importable for one release.

Importing an old path gives a ``DeprecationWarning``. Objects that were pickled under an old path load. The
module of an old path is created at its first import and holds no names itself: each name is looked up in the
new module.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "aggregators": "exchange",
    "aggregators.allgather": "exchange.allgather",
    "aggregators.base": "exchange.base",
    "aggregators.dense": "exchange.dense",
    "aggregators.gtopk": "exchange.gtopk",
    "aggregators.shared_indices": "exchange.shared_indices",
    "aggregators.summed": "exchange.voting_sum",
    "agreement": "exchange.agreement",
    "arrays": "interop.arrays",
    "averaging.base": "averaging.averager",
    "averaging.message": "averaging.flat",
    "averaging.schedules": "averaging.sync_sets",
    "bucket": "gradient.bucket",
    "foreign": "interop.dlpack",
    "hooks": "ddp.hook",
    "horovod.compressor": "horovod.pending",
    "horovod.engine": "horovod.gradient_sync",
    "memory.ownership": "memory.single_user",
    "planner.auto": "planner.measured",
    "planner.choice": "planner.plan",
    "planner.device": "planner.kernel_timing",
    "redistribute": "memory.resharding",
    "reducer": "reduction.reducer",
    "schedules": "selection.density",
    "scheme": "schemes",
    "selectors": "selection.selectors",
    "slots": "memory.parameter_memory",
    "sparse": "gradient.sparse_grad",
    "state": "ddp.state",
    "telemetry": "reduction.stats",
    "transports.doubling": "transports.recursive_doubling",
    "transports.roll_call": "transports.stragglers",
    "transports.rotation": "transports.pairwise",
    "worker": "ddp.comm_thread",
    "write_back": "reduction.write_back",
}
"""Old module: new module, both below ``commhooks``."""

RENAMED = {
    "aggregators.Context": "wire.message.Context",
    "aggregators.base.Context": "wire.message.Context",
    "aggregators.base.pack": "wire.message.pack",
    "aggregators.base.unpack": "wire.message.unpack",
    "hooks.prime_layout": "ddp.layout.prime_layout",
    "slots.Slot": "memory.parameter_memory.BucketMemory",
    "slots.SlotTable": "memory.parameter_memory.ParameterMemory",
    "transports.roll_call.RollCall": "transports.stragglers.Stragglers",
    "worker.Worker": "ddp.comm_thread.CommThread",
}
"""Old name: new name, for names that went to another module than ``MOVED`` says or were renamed."""

_ROOT = __package__ + "."


class _MovedModule(ModuleType):
    """A module of version 0.1. It looks its names up in the new module."""

    def __getattr__(self, name: str) -> Any:
        old = self.__name__.removeprefix(_ROOT)
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        module, _, attribute = RENAMED.get(f"{old}.{name}", f"{MOVED[old]}.{name}").rpartition(".")
        return getattr(import_module(_ROOT + module), attribute)


class _Finder(MetaPathFinder, Loader):
    """Import finder and loader of the modules in ``MOVED``. It ignores every other import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(_ROOT) or fullname.removeprefix(_ROOT) not in MOVED:
            return None
        return ModuleSpec(fullname, self, is_package=fullname == _ROOT + "aggregators")

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _MovedModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        new = _ROOT + MOVED[module.__name__.removeprefix(_ROOT)]
        warnings.warn(
            f"{module.__name__} has moved to {new}; the old path goes in the next release",
            DeprecationWarning,
            stacklevel=2,
        )


def install() -> None:
    """Makes the old paths importable. A second call does nothing.

    The new modules are imported only when an old path is.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
