"""Calls of the CPU library, one function per kernel, with arguments that :mod:`.ops` has checked.

ctypes releases the interpreter lock during a call. The library checks the contents of index and segment
arrays before it writes anything. When it refuses them, :mod:`.checks` finds the reason.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from . import abi, checks, cores
from .fused import Fused, Merged, Selected

_CPU = torch.device("cpu")
_ELEMENTS_PER_THREAD = 1 << 18  # a write-back of as many uses a thread more


def _call(name: str, *arguments: object, explain: Callable[[], None] = lambda: None) -> None:
    """Calls ``commhooks_cpu_<name>`` and turns its status into an exception.

    ``explain`` is called when the library refuses its arguments. It raises the precise error.
    """
    status = getattr(abi.cpu(), f"commhooks_cpu_{name}")(*arguments)
    if status == 0:
        return
    if status == abi.NO_MEMORY:
        raise MemoryError(f"{name}: no memory for scratch space")
    explain()
    raise ValueError(f"{name}: the native library refused its arguments")


def _pairs_and_report(out: Selected) -> tuple[int, int, int]:
    return out.values.data_ptr(), out.indices.data_ptr(), out.report.data_ptr()


def _threads(threads: int | None) -> int:
    wanted = torch.get_num_threads() if threads is None else threads
    if wanted > 1:
        _start_pool(wanted)
    return wanted


@functools.lru_cache(maxsize=64)
def _start_pool(threads: int) -> None:
    """Starts the library's threads from a thread that no OpenMP library has pinned (:mod:`.cores`).

    They inherit the cores of the thread that starts them. Does nothing when the caller is not pinned itself.
    """
    if not cores.is_pinned():
        return

    def start() -> None:
        cores.unpin()
        out = torch.empty(threads * _ELEMENTS_PER_THREAD, dtype=torch.float32, device=_CPU)
        nothing = abi.rows(out.new_empty((1, 0)), out.new_empty((1, 0), dtype=torch.int32))
        _call("write_back", out.data_ptr(), abi.DTYPES[out.dtype], out.numel(), nothing, 1.0, threads)

    thread = threading.Thread(target=start, name="commhooks pool")
    thread.start()
    thread.join()


def select_topk(
    fused: Fused, k: int, seed: int = 0, threads: int | None = None, out: Selected | None = None
) -> Selected:
    """See :func:`commhooks.native.ops.select_topk`."""
    out = Selected.empty(fused, k) if out is None else out
    _call(
        "select_topk",
        abi.operands(fused, out.active),
        k,
        seed & abi.MASK64,
        _threads(threads),
        *_pairs_and_report(out),
        explain=lambda: checks.segment_order(fused),
    )
    return out


def select_threshold(
    fused: Fused,
    threshold: float,
    k: int,
    start: int = 0,
    threads: int | None = None,
    out: Selected | None = None,
) -> Selected:
    """See :func:`commhooks.native.ops.select_threshold`."""
    out = Selected.empty(fused, k) if out is None else out
    _call(
        "select_threshold",
        abi.operands(fused, out.active),
        threshold,
        k,
        start,
        _threads(threads),
        *_pairs_and_report(out),
        explain=lambda: checks.segment_order(fused),
    )
    return out


def sample_threshold(fused: Fused, k: int, seed: int = 0) -> float:
    """See :func:`commhooks.native.ops.sample_threshold`."""
    result = ctypes.c_float()
    _call("sample_threshold", abi.operands(fused), k, seed & abi.MASK64, ctypes.byref(result))
    return result.value


def select_indices(
    fused: Fused, indices: Tensor, threads: int | None = None, out: Selected | None = None
) -> Selected:
    """See :func:`commhooks.native.ops.select_indices`."""

    def explain() -> None:
        checks.segment_order(fused)
        checks.index_order("indices", indices, fused.residual.numel())

    out = Selected.empty(fused, indices.numel(), indices=indices.clone()) if out is None else out
    _call(
        "select_indices",
        abi.operands(fused, out.active),
        indices.data_ptr(),
        indices.numel(),
        _threads(threads),
        out.values.data_ptr(),
        out.report.data_ptr(),
        explain=explain,
    )
    return out


def random_indices(seed: int, step: int, stream: int, numel: int, k: int, device: torch.device) -> Tensor:
    """See :func:`commhooks.native.ops.random_indices`."""
    indices = torch.empty(k, dtype=torch.int32, device=_CPU)
    _call(
        "random_indices",
        seed & abi.MASK64,
        step & abi.MASK64,
        stream & abi.MASK64,
        numel,
        k,
        indices.data_ptr(),
    )
    return indices


def merge_topk(
    values_a: Tensor,
    indices_a: Tensor,
    values_b: Tensor,
    indices_b: Tensor,
    k: int,
    threads: int | None = None,
    out: Merged | None = None,
) -> Merged:
    """See :func:`commhooks.native.ops.merge_topk`."""

    def explain() -> None:
        checks.index_order("indices_a", indices_a, None)
        checks.index_order("indices_b", indices_b, None)

    if out is None:
        out = Merged.empty(k, indices_a.numel(), indices_b.numel(), _CPU)
    _call(
        "merge_topk",
        values_a.data_ptr(),
        indices_a.data_ptr(),
        indices_a.numel(),
        values_b.data_ptr(),
        indices_b.data_ptr(),
        indices_b.numel(),
        k,
        _threads(threads),
        *(tensor.data_ptr() for tensor in out),
        explain=explain,
    )
    return out


def contains(wanted: Tensor, among: Tensor) -> Tensor:
    """See :func:`commhooks.native.ops.contains`."""

    def explain() -> None:
        checks.index_order("wanted", wanted, None)
        checks.index_order("among", among, None)

    found = torch.empty(wanted.numel(), dtype=torch.bool, device=_CPU)
    pointers = wanted.data_ptr(), wanted.numel(), among.data_ptr(), among.numel(), found.data_ptr()
    _call("contains", *pointers, explain=explain)
    return found


def scatter_add(dense: Tensor, values: Tensor, indices: Tensor, scale: float = 1.0) -> None:
    """See :func:`commhooks.native.ops.scatter_add`. ``values`` and ``indices`` have shape ``(m, k)``."""
    pointers = dense.data_ptr(), dense.numel(), abi.rows(values, indices), scale
    _call("scatter_add", *pointers, explain=lambda: checks.row_order(indices, dense.numel()))


def write_back(
    out: Tensor, values: Tensor, indices: Tensor, scale: float = 1.0, threads: int | None = None
) -> None:
    """See :func:`commhooks.native.ops.write_back`. ``values`` and ``indices`` have shape ``(m, k)``."""
    target = out.data_ptr(), abi.DTYPES[out.dtype], out.numel()
    rows = abi.rows(values, indices)
    explain = functools.partial(checks.row_order, indices, out.numel())
    _call("write_back", *target, rows, scale, _threads(threads), explain=explain)


def low_bit_encode(
    x: Tensor, bits: int, out: Tensor, remainder: Tensor | None = None, threads: int | None = None
) -> None:
    """See :func:`commhooks.native.ops.low_bit_encode`."""
    rest = None if remainder is None else remainder.data_ptr()
    target = out.data_ptr(), out.numel(), rest
    _call("low_bit_encode", x.data_ptr(), x.numel(), bits, _threads(threads), *target)


def low_bit_decode(message: Tensor, bits: int, out: Tensor, threads: int | None = None) -> None:
    """See :func:`commhooks.native.ops.low_bit_decode`. ``message`` has shape ``(1, size)``."""
    _decode("low_bit_decode", message, bits, out, threads)


def low_bit_decode_add(messages: Tensor, bits: int, out: Tensor, threads: int | None = None) -> None:
    """See :func:`commhooks.native.ops.low_bit_decode_add`. ``messages`` has shape ``(rows, size)``."""
    _decode("low_bit_decode_add", messages, bits, out, threads)


def _decode(name: str, messages: Tensor, bits: int, out: Tensor, threads: int | None) -> None:
    explain = functools.partial(checks.low_bit_contents, messages, bits, out.numel())
    target = out.data_ptr(), out.numel()
    _call(name, abi.messages(messages, bits), _threads(threads), *target, explain=explain)
