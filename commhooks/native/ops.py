"""The kernels, one function each. Each checks its arguments and calls the implementation for the device.

All tensors are 1-D, contiguous, without gradient and on one device. ``scatter_add``, ``write_back`` and
``low_bit_decode_add`` also take rows. Indices are int32, ascending and unique, with :data:`PAD` at unused
places at the end. A bad argument is refused before anything is written: by ``TypeError`` for a wrong dtype or
a number that is not an integer, else by ``ValueError``. An output that shares memory with an input is refused
too (``low_bit_encode`` has an exception). :class:`Fused` gives the formulas of the pass per element. All
implementations give bit-identical results, except ``sample_threshold``: each draws a sample of its own.

The contents of index arrays and of low-bit messages are checked on the CPU only, since a check on a GPU would
wait for the device. There, invalid indices give wrong results but cause no access outside the buffers, and
invalid messages give NaN.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from . import abi, checks, cpu, cuda, reference
from .fused import PAD, Fused, Merged, Selected

__all__ = [
    "PAD",
    "Fused",
    "Merged",
    "Selected",
    "contains",
    "low_bit_decode",
    "low_bit_decode_add",
    "low_bit_encode",
    "low_bit_size",
    "merge_topk",
    "random_indices",
    "sample_threshold",
    "scatter_add",
    "select_indices",
    "select_threshold",
    "select_topk",
    "write_back",
]


def _implementation(device: torch.device) -> ModuleType:
    """Returns the module with the kernels for ``device``: ``cpu``, ``cuda`` or ``reference``."""
    if device.type == "cpu" and abi.cpu() is not None:
        return cpu
    if device.type == "cuda" and abi.cuda() is not None:
        return cuda
    return reference


def select_topk(
    fused: Fused,
    k: int,
    *,
    seed: int = 0,
    values: Tensor | None = None,
    indices: Tensor | None = None,
    threads: int | None = None,
) -> Selected:
    """Corrects the gradient and takes out its ``k`` largest magnitudes, exactly (ties: the lower index).

    An element that is taken out is set to 0 in the residual. Zeros are never taken: with fewer than ``k``
    nonzero elements the remaining places are padding.

    Args:
        fused: operands. Residual and velocity are overwritten.
        k: number of places, in [0, n].
        seed: seed of the sample from which a first threshold is guessed. It affects time, never the result.
        values, indices: outputs, overwritten: float32 and int32 of shape ``(k,)``, possibly views of a
            message. None: new tensors.
        threads: number of CPU threads, default torch's. It never changes the result.

    Returns:
        ``Selected`` of ``k`` places, sorted by index.

    Raises:
        TypeError: a wrong dtype.
        ValueError: sizes, devices, layout or ``k``.
    """
    checks.fused_operands(fused)
    k = checks.places(k, fused.residual.numel())
    out = checks.outputs(fused, k, values, indices)
    threads = checks.thread_count(threads)
    implementation = _implementation(fused.residual.device)
    if implementation is reference:
        checks.segment_order(fused)
    result: Selected = implementation.select_topk(fused, k, checks.integer("seed", seed), threads, out)
    return result


def select_threshold(
    fused: Fused,
    threshold: float,
    k: int,
    *,
    start: int = 0,
    values: Tensor | None = None,
    indices: Tensor | None = None,
    threads: int | None = None,
) -> Selected:
    """Corrects the gradient and takes out at most ``k`` elements with magnitude above ``threshold``.

    Elements are taken in index order, cyclically from index ``start`` on. Those beyond ``k`` stay in the
    residual.

    Args:
        fused: operands. Residual and velocity are overwritten.
        threshold: at least 0.
        k: number of places, in [0, n].
        start: index at which the search begins, in [0, n), or 0 when n is 0.
        values, indices: outputs: see :func:`select_topk`.
        threads: number of CPU threads, default torch's. It never changes the result.

    Returns:
        ``Selected`` of ``k`` places, sorted by index.

    Raises:
        TypeError: a wrong dtype.
        ValueError: sizes, devices, layout, ``k``, ``threshold`` or ``start``.
    """
    checks.fused_operands(fused)
    numel = fused.residual.numel()
    k = checks.places(k, numel)
    threads = checks.thread_count(threads)
    if not threshold >= 0.0:
        raise ValueError(f"threshold must be at least 0, got {threshold}")
    start = checks.integer("start", start)
    if not 0 <= start < max(numel, 1):
        raise ValueError(f"start must be in [0, {max(numel, 1)}), got {start}")
    out = checks.outputs(fused, k, values, indices)
    implementation = _implementation(fused.residual.device)
    if implementation is reference:
        checks.segment_order(fused)
    result: Selected = implementation.select_threshold(fused, float(threshold), k, start, threads, out)
    return result


def sample_threshold(fused: Fused, k: int, *, seed: int = 0) -> float:
    """Estimates the ``k``-th largest magnitude of the corrected gradient from a sample.

    Nothing is overwritten. Waits for the device. Non-finite elements count as 0, and inactive segments count
    like active ones. The sample, and so the estimate, depends on the implementation.

    Raises:
        TypeError: a wrong dtype.
        ValueError: sizes, devices, layout or ``k``.
    """
    checks.fused_operands(fused)
    k = checks.places(k, fused.residual.numel())
    implementation = _implementation(fused.residual.device)
    result: float = implementation.sample_threshold(fused, k, checks.integer("seed", seed))
    return result


def select_indices(
    fused: Fused,
    indices: Tensor,
    *,
    values: Tensor | None = None,
    out: Tensor | None = None,
    threads: int | None = None,
) -> Selected:
    """Corrects the gradient and takes out the elements at ``indices``.

    Args:
        fused: operands. Residual and velocity are overwritten.
        indices: shape ``(k,)``, int32, ascending, unique. An entry in an inactive segment gives value 0, and
            its residual is kept.
        values: output, overwritten: float32 of shape ``(k,)``. None: a new tensor.
        out: where the copy of ``indices`` goes, int32 of shape ``(k,)``. None: a new tensor.
        threads: number of CPU threads, default torch's. It never changes the result.

    Returns:
        ``Selected`` with a copy of ``indices``. The count in the report is of all that are not padding.

    Raises:
        TypeError: a wrong dtype.
        ValueError: sizes, devices, layout, or (CPU) indices out of order or range.
    """
    checks.fused_operands(fused)
    checks.array("indices", indices, checks.I32, fused.residual.device)
    checks.no_overlap(checks.overwritten(fused), [("indices", indices)])
    if out is None:
        out = torch.empty_like(indices)
    selected = checks.outputs(fused, indices.numel(), values, out, [("indices", indices)])
    out.copy_(indices)
    threads = checks.thread_count(threads)
    implementation = _implementation(fused.residual.device)
    if implementation is reference:
        checks.segment_order(fused)
        checks.index_order("indices", indices, fused.residual.numel())
    result: Selected = implementation.select_indices(fused, indices, threads, selected)
    return result


def random_indices(
    seed: int, step: int, stream: int, numel: int, k: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Draws ``k`` distinct pseudo-random indices below ``numel``, the same on every device and machine.

    A Feistel permutation with cycle-walking, keyed by ``(seed, step, stream)``, is applied to 0 .. k-1, in
    O(k) and in integers only. No global random state is read or changed.

    Returns:
        shape ``(k,)``, int32, ascending, on ``device``.

    Raises:
        TypeError: a number that is not an integer.
        ValueError: ``k`` or ``numel`` out of range.
    """
    seed, step, stream = (
        checks.integer(name, value) for name, value in (("seed", seed), ("step", step), ("stream", stream))
    )
    numel = checks.integer("numel", numel)
    if not 0 <= numel < PAD:
        raise ValueError(f"numel must be in [0, 2**31 - 1), got {numel}")
    k = checks.places(k, numel)
    device = torch.device(device)
    result: Tensor = _implementation(device).random_indices(seed, step, stream, numel, k, device)
    return result


def merge_topk(
    values_a: Tensor,
    indices_a: Tensor,
    values_b: Tensor,
    indices_b: Tensor,
    k: int,
    *,
    out: tuple[Tensor, Tensor] | None = None,
    threads: int | None = None,
) -> Merged:
    """Selects the ``k`` largest magnitudes of the sum of two sparse gradients, sorted by index.

    This is gTop-k's operator (eq. 6 of Shi et al., IJCAI 2019), in O(k). Values at an index that both inputs
    have are added. Every index of the inputs is eligible. A sum of 0 ranks last. Ties go to the lower index.
    Inputs are not changed.

    Args:
        values_a, values_b: float32, shape ``(k_a,)`` and ``(k_b,)``.
        indices_a, indices_b: int32, ascending, padding at the end.
        k: number of places in the result.
        out: values and indices of the result, overwritten: float32 and int32 of shape ``(k,)``, possibly
            views of a message. None: new tensors.
        threads: number of CPU threads, default torch's. It never changes the result.

    Returns:
        ``Merged``: the pairs, and which entries of each input are in them.

    Raises:
        TypeError: a wrong dtype.
        ValueError: sizes, devices, layout, a negative ``k``, or (CPU) indices out of order.
    """
    device = values_a.device if isinstance(values_a, Tensor) else torch.device("cpu")
    checks.pairs("_a", values_a, indices_a, device)
    checks.pairs("_b", values_b, indices_b, device)
    k = checks.places(k, PAD - 1)
    threads = checks.thread_count(threads)
    implementation = _implementation(device)
    if implementation is reference:
        checks.index_order("indices_a", indices_a, None)
        checks.index_order("indices_b", indices_b, None)
    inputs = (values_a, indices_a, values_b, indices_b)
    result: Merged = implementation.merge_topk(*inputs, k, threads, checks.merged(k, inputs, out))
    return result


def contains(wanted: Tensor, among: Tensor) -> Tensor:
    """Whether each index in ``wanted`` is in ``among``, in time linear in both sizes.

    Args:
        wanted: shape ``(k,)``, int32, ascending, unique, padding at the end.
        among: shape ``(m,)``, the same.

    Returns:
        Bool, shape ``(k,)``. False for padding.

    Raises:
        TypeError: a wrong dtype.
        ValueError: devices, layout, or (CPU) indices out of order.
    """
    device = wanted.device if isinstance(wanted, Tensor) else torch.device("cpu")
    checks.array("wanted", wanted, checks.I32, device)
    checks.array("among", among, checks.I32, device)
    implementation = _implementation(device)
    if implementation is cpu:
        return cpu.contains(wanted, among)
    if device.type == "cpu":
        checks.index_order("wanted", wanted, None)
        checks.index_order("among", among, None)
    return reference.contains(wanted, among)


def scatter_add(dense: Tensor, values: Tensor, indices: Tensor, scale: float = 1.0) -> None:
    """Does ``dense[indices] += scale * values`` in place. Padding is skipped.

    Args:
        dense: shape ``(n,)``, float32, changed in place.
        values: shape ``(k,)`` or ``(m, k)``, float32. Rows are added in order. Each row is contiguous. The
            distance between rows is free, so that rows may be views of a message.
        indices: like ``values``, int32, each row ascending and unique, below n.
        scale: factor of the values. The product is rounded to float32 before it is added.

    Raises:
        TypeError: a wrong dtype.
        ValueError: sizes, devices, layout, or (CPU) indices out of order or range.
    """
    device = dense.device if isinstance(dense, Tensor) else torch.device("cpu")
    checks.array("dense", dense, checks.F32, device)
    values, indices = checks.rows(values, indices, "dense", dense)
    implementation = _implementation(device)
    if implementation is reference:
        checks.row_order(indices, dense.numel())
    implementation.scatter_add(dense, values, indices, float(scale))


def write_back(
    out: Tensor, values: Tensor, indices: Tensor, scale: float = 1.0, *, threads: int | None = None
) -> None:
    """Overwrites ``out`` with zeros, then adds ``scale * values`` at ``indices``. Padding is skipped.

    Args:
        out: shape ``(n,)``, float32, bfloat16 or float16, overwritten.
        values: shape ``(k,)`` or ``(m, k)``, float32. Rows are added in order. Each row is contiguous. The
            distance between rows is free, so that rows may be views of a message. A bfloat16 or float16
            ``out`` takes one row. The result is clamped to the finite range and rounded to nearest.
        indices: like ``values``, int32, each row ascending and unique, below n.
        scale: factor of the values.
        threads: number of CPU threads, default torch's. It never changes the result.

    Raises:
        TypeError: a wrong dtype.
        ValueError: sizes, devices, layout, or (CPU) indices out of order or range.
    """
    device = out.device if isinstance(out, Tensor) else torch.device("cpu")
    checks.array("out", out, checks.GRAD_DTYPES, device)
    values, indices = checks.rows(values, indices, "out", out)
    threads = checks.thread_count(threads)
    implementation = _implementation(device)
    if implementation is reference:
        checks.row_order(indices, out.numel())
    implementation.write_back(out, values, indices, float(scale), threads)


def low_bit_size(numel: int, bits: int) -> int:
    """Bytes of the low-bit message of ``numel`` elements: ``2 * ceil(numel / 256) + ceil(numel * bits / 8)``.

    Args:
        numel: number of elements, in [0, 2**31 - 1).
        bits: 1, 2, 4 or 8.

    Raises:
        TypeError: a number that is not an integer.
        ValueError: ``numel`` or ``bits`` out of range.
    """
    number = checks.integer("numel", numel)
    if not 0 <= number < PAD:
        raise ValueError(f"numel must be in [0, 2**31 - 1), got {number}")
    return checks.low_bit_size(number, checks.low_bits(bits))


def low_bit_encode(
    x: Tensor,
    bits: int,
    out: Tensor | None = None,
    remainder: Tensor | None = None,
    *,
    threads: int | None = None,
) -> Tensor:
    """Encodes ``x`` with ``bits`` bits an element and one scale for every 256 elements.

    A message holds the scales (bfloat16, little endian) and then the codes, the lowest bits of a byte first.
    The value of an element is a level times the scale ``s`` of its block. The levels are -1 and 1 with
    1 bit, -3, -1, 1 and 3 with 2, -7 to 7 with 4, and -127 to 127 with 8. ``s`` is the mean magnitude
    (1 bit), 0.625 of it (2 bits), or the largest magnitude by the largest level. docs/kernels.md has the
    rounding. A scale below 2**-100 becomes 0, one above 2**100 becomes 2**100: what is not sent stays in
    the remainder. A block with an element that is not finite has scale NaN.

    Args:
        x: shape ``(n,)``, float32. It is only read unless it is ``remainder``.
        bits: 1, 2, 4 or 8.
        out: output, overwritten: uint8 of shape ``(low_bit_size(n, bits),)``. None: a new tensor.
        remainder: output, overwritten with ``x - decoded``: float32 of shape ``(n,)``, possibly ``x`` itself.
            None: not wanted.
        threads: number of CPU threads, default torch's. It never changes the result.

    Returns:
        The message: ``out``, or the new tensor.

    Raises:
        TypeError: a wrong dtype.
        ValueError: sizes, devices, layout or ``bits``.
    """
    device = x.device if isinstance(x, Tensor) else torch.device("cpu")
    checks.array("x", x, checks.F32, device)
    bits = checks.low_bits(bits)
    threads = checks.thread_count(threads)
    size = checks.low_bit_size(x.numel(), bits)
    message = torch.empty(size, dtype=torch.uint8, device=device) if out is None else out
    checks.bytes_array("out", message, device, size)
    written = [("out", message)]
    if remainder is not None:
        checks.array("remainder", remainder, checks.F32, device, x.numel())
        if remainder.data_ptr() != x.data_ptr():
            written.append(("remainder", remainder))
    checks.no_overlap(written, [("x", x)])
    _implementation(device).low_bit_encode(x, bits, message, remainder, threads)
    return message


def low_bit_decode(message: Tensor, bits: int, out: Tensor, *, threads: int | None = None) -> None:
    """Overwrites ``out`` with the values of a message of :func:`low_bit_encode`.

    Args:
        message: shape ``(low_bit_size(n, bits),)``, uint8. A block with scale NaN decodes to NaN.
        bits: 1, 2, 4 or 8, as it was encoded.
        out: shape ``(n,)``, float32, overwritten.
        threads: number of CPU threads, default torch's. It never changes the result.

    Raises:
        TypeError: a wrong dtype.
        ValueError: sizes, devices, layout or ``bits``, or (CPU) a scale or code that no encoder writes, with
            its block.
    """
    bits = checks.low_bits(bits)
    rows = checks.low_bit_messages(message, bits, out)
    if rows.shape[0] != 1:
        raise ValueError(f"message must be one row, got {rows.shape[0]} rows")
    threads = checks.thread_count(threads)
    implementation = _implementation(out.device)
    if implementation is reference:
        checks.low_bit_contents(rows, bits, out.numel())
    implementation.low_bit_decode(rows, bits, out, threads)


def low_bit_decode_add(messages: Tensor, bits: int, out: Tensor, *, threads: int | None = None) -> None:
    """Adds the values of messages of :func:`low_bit_encode` onto ``out``, row after row, in one pass.

    Args:
        messages: shape ``(low_bit_size(n, bits),)`` or ``(rows, low_bit_size(n, bits))``, uint8. Each row is
            contiguous. The distance between rows is free. A block with scale NaN decodes to NaN.
        bits: 1, 2, 4 or 8, as they were encoded.
        out: shape ``(n,)``, float32, changed in place.
        threads: number of CPU threads, default torch's. It never changes the result.

    Raises:
        TypeError: a wrong dtype.
        ValueError: sizes, devices, layout or ``bits``, or (CPU) a scale or code that no encoder writes, with
            its block and message. Nothing has been added then.
    """
    bits = checks.low_bits(bits)
    rows = checks.low_bit_messages(messages, bits, out)
    threads = checks.thread_count(threads)
    implementation = _implementation(out.device)
    if implementation is reference:
        checks.low_bit_contents(rows, bits, out.numel())
    implementation.low_bit_decode_add(rows, bits, out, threads)
