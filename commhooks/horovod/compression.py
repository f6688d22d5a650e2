"""``Compression``: sparsification for Horovod's own optimizer, by its ``compression=`` argument.

Only public parts of Horovod are used here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..ddp.recipe import Recipe
from ..errors import SettingsMismatchError, says_what_to_write
from ..memory import Memory
from ..selection.density import DensitySchedule
from ..selection.selectors import RandomK, TopK
from ..wire.message import pack, unpack_all
from .api import horovod, wait_for
from .pending import CompressorCore, PendingGradient

_VOTE = 4096.0  # added to the marker by a rank that found NaN or Inf


class SparseCompressor(horovod().compression.Compressor, ABC):  # type: ignore[misc]
    """A compression object for ``hvd.DistributedOptimizer``: error feedback per parameter, a sparse exchange.

    Horovod calls ``compress(p.grad)`` when a gradient is ready. It calls ``decompress`` in
    ``synchronize()``, where the result replaces the gradient. One object serves one optimizer.
    :class:`Compression` makes these objects.
    """

    def __init__(self, core: CompressorCore) -> None:
        self.core = core
        self._averages: bool | None = None  # op is Average (True) or Sum; None: not known yet

    @abstractmethod
    def compress(self, tensor: Tensor) -> tuple[Tensor, PendingGradient]:
        """Selects what is sent. Returns what Horovod is to all-reduce, and what :meth:`decompress` needs.

        Args:
            tensor: ``p.grad`` itself, dense, not a copy of it. It is not changed.

        Returns:
            A float32 tensor ``(m,)``, and the record of this gradient.

        Raises:
            ValueError: ``tensor`` is sparse, or the gradient of no parameter. The message names the option
                of Horovod's optimizer that leads here.
        """

    @abstractmethod
    def decompress(self, tensor: Tensor, ctx: PendingGradient) -> Tensor:
        """Returns the reduced gradient, a new tensor in the gradient's shape and dtype.

        Args:
            tensor: Horovod's result for what :meth:`compress` returned.
            ctx: the record that :meth:`compress` returned.

        Raises:
            SettingsMismatchError: ranks disagree on settings or parameters.
            PeerTimeoutError: a rank has not sent its settings or its pairs after ``timeout_s`` seconds.
            NonFiniteGradientError: with ``nonfinite="error"``.
            ValueError: the optimizer's ``op`` is neither Average nor Sum.
        """

    def state_dict(self) -> dict[str, Any]:
        """Returns this rank's residuals, velocities and step counts by name. Each rank saves its own."""
        return self.core.state_dict()

    def load_state_dict(self, state: dict[str, Any], *, strict: bool = True) -> None:
        """Loads what this rank's :meth:`state_dict` gave. ``strict`` as for ``SparseState``."""
        self.core.load_state_dict(state, strict)

    def stats(self) -> dict[str, Any]:
        """Figures of the last step on this rank: bytes, compression ratio, residual norm."""
        return self.core.stats()

    def _marker(self) -> float:
        """Returns 3 on rank 0, 1 elsewhere: so sum, average, minimum, maximum and product differ."""
        return 3.0 if self.core.process_set.rank() == 0 else 1.0

    def _read_marker(self, reduced: float) -> tuple[bool, bool]:
        """Reads (some rank voted, all ranks took part) off the reduced marker. The first call learns op."""
        world_size = self.core.process_set.size()
        for averages in (True, False) if self._averages is None else (self._averages,):
            total = round(reduced * world_size if averages else reduced)
            votes, rest = divmod(total, int(_VOTE))
            complete = rest == world_size + 2
            if complete or self._averages is not None:
                if self.core.memory.decays and not averages:
                    raise ValueError(
                        "op must be hvd.Average with weight decay in the memory, got hvd.Sum: a sum would "
                        "have one L2 term of every rank"
                    )
                self._averages = averages
                return votes > 0, complete
        raise ValueError(
            f"op must be hvd.Average or hvd.Sum for a sparse compression over {world_size} ranks: a marker "
            f"came back as {reduced:g} (or process_set is not the optimizer's)"
        )


class RandomKCompressor(SparseCompressor):
    """Random-k: all-reduces k values under a mask that all ranks derive from seed, step and name."""

    def compress(self, tensor: Tensor) -> tuple[Tensor, PendingGradient]:
        pending = self.core.begin(tensor)
        pairs = pending.route.pairs
        message = torch.empty(pairs.k + 1, dtype=torch.float32, device=tensor.device)
        message[:-1] = pairs.values
        message[-1] = self._marker() + (_VOTE if pending.route.bad else 0.0)
        world_size = self.core.process_set.size()
        self.core.count(2 * (world_size - 1) * 4 * message.numel() // world_size)
        return message, pending

    def decompress(self, tensor: Tensor, ctx: PendingGradient) -> Tensor:
        core = self.core
        core.check_agreement()
        voted, complete = self._read_marker(float(tensor[-1]))
        # After hvd.join() some ranks send zeros and draw no mask. The step count then stands still on all
        # ranks, so that they go on to draw the same masks.
        ctx.entry.step += complete
        share = 1.0 if self._averages else float(core.process_set.size())
        indices = ctx.route.pairs.indices[None]
        return core.finish(ctx, tensor[None, :-1].contiguous(), indices, 1.0, share, voted)


class TopKCompressor(SparseCompressor):
    """Top-k: all-gathers each rank's own k largest, beside Horovod's all-reduce of one element."""

    def compress(self, tensor: Tensor) -> tuple[Tensor, PendingGradient]:
        core = self.core
        pending = core.begin(tensor)
        message = pack(pending.route.pairs, pending.route.bad > 0, pending.route.context)
        pending.handle = horovod().allgather_async(
            message, name=core.name_of(pending.entry), process_set=core.process_set
        )
        self.core.count((core.process_set.size() - 1) * 4 * message.numel())
        return torch.tensor([self._marker()], dtype=torch.float32, device=tensor.device), pending

    def decompress(self, tensor: Tensor, ctx: PendingGradient) -> Tensor:
        core, entry = self.core, ctx.entry
        core.check_agreement()
        self._read_marker(float(tensor))
        assert ctx.handle is not None
        gathered = wait_for(ctx.handle, core.timeout_s, f"all-gather of {entry.name}")
        world_size = core.process_set.size()
        if gathered.numel() % world_size:
            raise SettingsMismatchError(
                f"{entry.name}: the ranks sent {gathered.numel()} words of unequal shares"
            )
        messages, numel = gathered.view(world_size, -1), entry.parameter.numel()
        values, indices, voted = unpack_all(messages, numel, ctx.route.context)
        entry.step += 1
        factor, share = (1.0 / world_size, 1.0) if self._averages else (1.0, float(world_size))
        return core.finish(ctx, values, indices, factor, share, voted)


class Compression:
    """Sparse compressions for the stock ``hvd.DistributedOptimizer``.

    Example:
        >>> compression = Compression.for_optimizer(
        ...     optimizer, model.named_parameters(), density=0.01, warmup_steps=500)
        >>> optimizer = hvd.DistributedOptimizer(
        ...     optimizer, model.named_parameters(), compression=compression)
    """

    @staticmethod
    @says_what_to_write
    def randomk(
        density: float | DensitySchedule,
        named_parameters: Iterable[tuple[str, Tensor]],
        *,
        seed: int = 0,
        memory: Memory | None = None,
        nonfinite: str = "propagate",
        process_set: Any = None,
        timeout_s: float | None = None,
    ) -> SparseCompressor:
        """Makes random-k with a mask all ranks share: Horovod all-reduces ``k + 1`` floats per parameter.

        It works with tensor groups, ``backward_passes_per_step``, process sets, op Average and Sum,
        ``gradient_predivide_factor``, and ``hvd.join()``. Adasum and ``sparse_as_dense`` are a ``ValueError``
        at the first gradient.

        Args:
            density: k/n in (0, 1], or a schedule. k is at least 1 for each parameter.
            named_parameters: the ones given to the optimizer.
            seed: of the masks, the same on all ranks.
            memory: None: ``ErrorFeedback()``. ``NoMemory()`` for none. One object per compression.
            nonfinite: ``"propagate"``, ``"skip"`` or ``"error"``, as for :class:`commhooks.SparseState`.
            process_set: the one given to the optimizer.
            timeout_s: seconds until a missing rank is an error, in the waits of commhooks. None: the default
                process group's timeout, or 300 s without a group. Horovod's own waits end after
                ``HOROVOD_STALL_SHUTDOWN_TIME_SECONDS``, and only under MPI: see docs/horovod.md.
        """
        selector = RandomK(density, seed)
        core = CompressorCore(selector, named_parameters, memory, nonfinite, process_set, timeout_s)
        return RandomKCompressor(core)

    @staticmethod
    def for_optimizer(
        optimizer: torch.optim.Optimizer,
        named_parameters: Iterable[tuple[str, Tensor]],
        density: float = 0.01,
        *,
        warmup_steps: int | None = None,
        scheme: str | None = None,
        clip_norm: float | None = None,
        factor_masking: bool | None = None,
        rescale_with_lr: bool = False,
        **options: Any,
    ) -> SparseCompressor:
        """Makes the compression that goes with an optimizer: see :meth:`commhooks.SparseState.for_optimizer`.

        Call it before ``hvd.DistributedOptimizer`` wraps the optimizer. Arguments and defaults are those of
        ``SparseState``'s, except that there is no 4-bit scheme here and a clip is by parameter. For an
        optimizer with a second moment rank 0's line names the 4 bits of
        :func:`commhooks.horovod.DistributedOptimizer`.

        Args:
            optimizer: the job's optimizer. Momentum and weight decay of an SGD move into the memory.
            named_parameters: the ones given to ``hvd.DistributedOptimizer``.
            density: k/n in (0, 1] after the warm-up. k is at least 1 for each parameter.
            warmup_steps: steps over which the density falls from 0.25 to ``density``. 0: none. It must be
                given.
            scheme: ``"topk"`` or ``"randomk"``. None: ``"topk"``.
            clip_norm: largest norm of this rank's gradient of a parameter, before the memory.
            factor_masking: whether the velocity is set to zero where a value was sent. None: without a
                warm-up only.
            rescale_with_lr: whether what is withheld keeps the learning rate of its own step: see
                ``ErrorFeedback``.
            options: further arguments of :meth:`topk` or :meth:`randomk` except ``memory``.

        Raises:
            TypeError: ``optimizer`` is no torch optimizer, ``memory`` is given, or ``warmup_steps`` is
                missing.
            ValueError: as :meth:`commhooks.SparseState.for_optimizer`.
        """
        if "memory" in options:
            raise TypeError(
                "for_optimizer() makes the memory: write Compression.topk(..., memory=...) instead"
            )
        scheme = "topk" if scheme is None else scheme
        if scheme not in ("topk", "randomk"):
            raise ValueError(f"scheme must be topk or randomk here, got {scheme!r}")
        recipe = Recipe(
            optimizer,
            density,
            warmup_steps=warmup_steps,
            scheme=scheme,
            clip=None if clip_norm is None else (clip_norm, "bucket"),
            factor_masking=factor_masking,
            rescale_with_lr=rescale_with_lr,
        )
        make = Compression.topk if scheme == "topk" else Compression.randomk
        compression = make(recipe.density, named_parameters, memory=recipe.memory, **options)
        compression.core.moved = recipe.apply()
        return compression

    @staticmethod
    @says_what_to_write
    def topk(
        density: float | DensitySchedule,
        named_parameters: Iterable[tuple[str, Tensor]],
        *,
        memory: Memory | None = None,
        nonfinite: str = "propagate",
        process_set: Any = None,
        timeout_s: float | None = None,
    ) -> SparseCompressor:
        """Makes exact top-k of each rank and parameter, all-gathered as soon as a gradient is ready.

        Horovod's own all-reduce carries one element. It works where :meth:`randomk` does, except with
        ``hvd.join()``, which Horovod itself refuses beside an all-gather. The arguments are those of
        :meth:`randomk`.
        """
        core = CompressorCore(TopK(density), named_parameters, memory, nonfinite, process_set, timeout_s)
        return TopKCompressor(core)
