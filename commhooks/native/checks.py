"""Checks of the kernels' arguments.

A wrong type or dtype raises ``TypeError``, everything else ``ValueError``.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from .fused import PAD, Fused, Merged, Selected

GRAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
F32 = (torch.float32,)
I32 = (torch.int32,)
_MOST_THREADS = 4096  # no machine has as many cores, and the libraries take an int32

#: Elements of one block of a low-bit message. They share a scale.
LOW_BIT_BLOCK = 256
# 2**-100, 2**100 and infinity as the bits of bfloat16.
_LEAST_SCALE, _LARGEST_SCALE, _INFINITE_SCALE = 27 << 7, 227 << 7, 255 << 7


def _typed(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must have dtype {' or '.join(map(str, dtypes))}, got {tensor.dtype}")


def _placed(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")
    if tensor.requires_grad:
        raise ValueError(f"{name} must not require grad (detach it)")


def array(
    name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], device: torch.device, numel: int | None = None
) -> None:
    """Raises unless ``tensor`` is a contiguous 1-D tensor of one of ``dtypes`` on ``device``."""
    _typed(name, tensor, dtypes)
    if tensor.layout != torch.strided or tensor.dim() != 1 or not tensor.is_contiguous():
        raise ValueError(f"{name} must be a contiguous 1-D tensor, got shape {tuple(tensor.shape)}")
    _placed(name, tensor, device)
    if numel is not None and tensor.numel() != numel:
        raise ValueError(f"{name} must have {numel} elements, got {tensor.numel()}")
    if tensor.numel() >= PAD:
        raise ValueError(f"{name} must have fewer than 2**31 - 1 elements, got {tensor.numel()}")


def fused_operands(fused: Fused) -> None:
    """Raises unless the operands agree in dtype, size and device and no output overlaps an input."""
    residual = fused.residual
    if not isinstance(residual, Tensor):
        raise TypeError(f"residual must be a torch.Tensor, got {type(residual).__name__}")
    device = residual.device
    numel = residual.numel()
    # The gradient is checked first. A residual that was made in the gradient's shape is not the one to blame.
    array("grad", fused.grad, GRAD_DTYPES, device, numel)
    array("residual", residual, F32, device)
    if fused.velocity is not None:
        array("velocity", fused.velocity, F32, device, numel)
    elif fused.momentum != 0.0:
        raise ValueError(f"momentum must be 0 without velocity, got {fused.momentum}")
    if fused.scale_tensor is not None:
        factor = fused.scale_tensor
        array("scale_tensor", factor.reshape(-1) if isinstance(factor, Tensor) else factor, F32, device, 1)
    if fused.segments is not None:
        segment_offsets(fused.segments, device)
    if fused.residual_out is not None:
        array("residual_out", fused.residual_out, F32, device, numel)
    if fused.velocity_out is not None:
        if fused.velocity is None:
            raise ValueError("velocity_out needs velocity, got None")
        array("velocity_out", fused.velocity_out, F32, device, numel)
    if fused.rescale is not None:
        array("rescale", fused.rescale, F32, device, fused.num_segments or 1)
    no_overlap(overwritten(fused), inputs(fused))


def inputs(fused: Fused) -> list[tuple[str, Tensor]]:
    """Yields name and tensor of the operands that the pass only reads."""
    named = [
        ("grad", fused.grad),
        ("scale_tensor", fused.scale_tensor),
        ("segments", fused.segments),
        ("rescale", fused.rescale),
    ]
    if fused.residual_out is not None:
        named.append(("residual", fused.residual))
    if fused.velocity_out is not None:
        named.append(("velocity", fused.velocity))
    return [(name, tensor) for name, tensor in named if tensor is not None]


def overwritten(fused: Fused) -> list[tuple[str, Tensor]]:
    """Yields name and tensor of the operands that the pass overwrites."""
    named = [
        ("residual", fused.residual) if fused.residual_out is None else ("residual_out", fused.residual_out),
        ("velocity", fused.velocity) if fused.velocity_out is None else ("velocity_out", fused.velocity_out),
    ]
    return [(name, tensor) for name, tensor in named if tensor is not None]


def outputs(
    fused: Fused,
    k: int,
    values: Tensor | None,
    indices: Tensor | None,
    read: Sequence[tuple[str, Tensor]] = (),
) -> Selected:
    """Checks the given outputs of a selection and makes new ones for None.

    Args:
        fused: the operands.
        k: number of places.
        values, indices: the outputs that were given, or None.
        read: name and tensor of what the selection reads besides the operands.
    """
    device = fused.residual.device
    given = []
    for name, tensor, dtypes in (("values", values, F32), ("indices", indices, I32)):
        if tensor is not None:
            array(name, tensor, dtypes, device, k)
            given.append((name, tensor))
    if given:
        no_overlap(given, [*inputs(fused), *overwritten(fused), *read])
    return Selected.empty(fused, k, values, indices)


def segment_offsets(segments: Tensor, device: torch.device) -> None:
    """Checks dtype, layout and size of ``segments``. :func:`segment_order` checks the offsets."""
    array("segments", segments, (torch.int64,), device)
    if segments.numel() < 2:
        raise ValueError(f"segments must hold at least 2 offsets, got {segments.numel()}")


def segment_order(fused: Fused) -> None:
    """Raises unless the offsets in ``segments`` ascend from 0 to n.

    On CUDA nothing is checked, since that would wait for the device.
    """
    segments, numel = fused.segments, fused.residual.numel()
    if segments is None or segments.device.type != "cpu":
        return
    if int(segments[0]) != 0 or int(segments[-1]) != numel or bool((segments[1:] < segments[:-1]).any()):
        raise ValueError(f"segments must ascend from 0 to {numel}, got {segments.tolist()}")


def merged(
    k: int, inputs: tuple[Tensor, Tensor, Tensor, Tensor], out: tuple[Tensor, Tensor] | None
) -> Merged:
    """Checks the given outputs of a merge and makes the others.

    Args:
        k: number of places.
        inputs: values and indices of both inputs.
        out: values and indices of the result. None: new ones.
    """
    _, indices_a, _, indices_b = inputs
    sizes, device = (k, indices_a.numel(), indices_b.numel()), indices_a.device
    if out is None:
        return Merged.empty(*sizes, device)
    values, indices = out
    array("values", values, F32, device, k)
    array("indices", indices, I32, device, k)
    names = ("values_a", "indices_a", "values_b", "indices_b")
    no_overlap([("values", values), ("indices", indices)], list(zip(names, inputs, strict=True)))
    return Merged.empty(*sizes, device, values, indices)


def no_overlap(written: list[tuple[str, Tensor]], read: list[tuple[str, Tensor]]) -> None:
    """Raises when an output shares memory with an input or with another output."""
    outputs_at = [(name, *_span(tensor)) for name, tensor in written]
    inputs_at = [(name, *_span(tensor)) for name, tensor in read]
    for number, (name, start, end) in enumerate(outputs_at):
        for other_name, other_start, other_end in (*inputs_at, *outputs_at[number + 1 :]):
            if max(start, other_start) < min(end, other_end):
                raise ValueError(f"{other_name} and {name} must not share memory")


def _span(tensor: Tensor) -> tuple[int, int]:
    """Returns the address range of a tensor: its first byte, and the first byte after it."""
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return start, start + tensor.nbytes
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


def low_bits(bits: object) -> int:
    """Returns ``bits`` as an int. Raises unless it is 1, 2, 4 or 8."""
    number = integer("bits", bits)
    if number not in (1, 2, 4, 8):
        raise ValueError(f"bits must be 1, 2, 4 or 8, got {number}")
    return number


def bytes_array(name: str, tensor: Tensor, device: torch.device, size: int) -> None:
    """Raises unless ``tensor`` is a contiguous 1-D uint8 tensor of ``size`` bytes on ``device``."""
    _typed(name, tensor, (torch.uint8,))
    if tensor.dim() != 1 or not tensor.is_contiguous() or tensor.numel() != size:
        raise ValueError(f"{name} must be contiguous with shape ({size},), got {tuple(tensor.shape)}")
    _placed(name, tensor, device)


def low_bit_messages(messages: Tensor, bits: int, out: Tensor) -> Tensor:
    """Checks the low-bit messages that are decoded into ``out`` and returns them as ``(rows, size)``.

    :func:`low_bit_contents` checks their bytes.
    """
    array("out", out, F32, out.device if isinstance(out, Tensor) else torch.device("cpu"))
    _typed("messages", messages, (torch.uint8,))
    _placed("messages", messages, out.device)
    size = low_bit_size(out.numel(), bits)
    if messages.dim() not in (1, 2) or messages.shape[-1] != size:
        raise ValueError(
            f"messages must have shape ({size},) or (rows, {size}) for {out.numel()} elements of {bits} "
            f"bits, got {tuple(messages.shape)}"
        )
    rows = messages[None] if messages.dim() == 1 else messages
    if rows.layout != torch.strided or (size > 1 and rows.stride(1) != 1):
        raise ValueError(f"rows of messages must be contiguous, got strides {rows.stride()}")
    no_overlap([("out", out)], [("messages", messages)])
    return rows


def low_bit_size(numel: int, bits: int) -> int:
    """Bytes of a low-bit message of ``numel`` elements: a scale of 2 bytes a block, and the codes."""
    return 2 * -(-numel // LOW_BIT_BLOCK) + -(-numel * bits // 8)


def low_bit_contents(messages: Tensor, bits: int, numel: int) -> None:
    """Raises unless all scales and codes of ``messages`` ``(rows, size)`` are ones that an encoder writes.

    A scale is 0, NaN or in [2**-100, 2**100]. With 4 and 8 bits no code is 0. On CUDA nothing is checked,
    since that would wait for the device.
    """
    if messages.device.type != "cpu" or not messages.numel():
        return
    blocks = -(-numel // LOW_BIT_BLOCK)
    for number, message in enumerate(messages):
        scales = low_bit_scales(message, blocks)
        wrong = ~low_bit_scale_valid(scales)
        if bool(wrong.any()):
            block = int(wrong.int().argmax())
            value = scales[block].view(torch.bfloat16).item()
            raise ValueError(
                f"the scale of block {block} of message {number} must be 0, NaN or in [2**-100, 2**100], "
                f"got {value}"
            )
        if bits >= 4:
            code = message[2 * blocks :]
            zero = code == 0 if bits == 8 else ((code & 15) == 0) | ((code >> 4) == 0)
            if bits == 4 and numel % 2:
                zero[-1] = (int(code[-1]) & 15) == 0
            if bool(zero.any()):
                block = int(zero.int().argmax()) * 8 // bits // LOW_BIT_BLOCK
                raise ValueError(f"block {block} of message {number} must not hold code 0, got one")


def low_bit_scales(message: Tensor, blocks: int) -> Tensor:
    """Returns the scales of one message as the bits of bfloat16: int16 ``(blocks,)``, a copy."""
    return message[: 2 * blocks].clone().view(torch.int16)


def low_bit_scale_valid(scales: Tensor) -> Tensor:
    """Tells, as bool, which scales (bits of bfloat16 as int16) are 0, NaN or in [2**-100, 2**100]."""
    in_range = (scales >= _LEAST_SCALE) & (scales <= _LARGEST_SCALE)
    return (scales == 0) | in_range | ((scales & 0x7FFF) > _INFINITE_SCALE)


def integer(name: str, value: object) -> int:
    """Returns ``value`` as an int. What Python accepts as an index will do, numpy's too, but no bool."""
    if not isinstance(value, bool):
        try:
            return operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            pass
    raise TypeError(f"{name} must be an int, got {type(value).__name__}")


def places(k: object, numel: int) -> int:
    """Returns ``k`` as an int. Raises unless it is in [0, numel]."""
    number = integer("k", k)
    if not 0 <= number <= numel:
        raise ValueError(f"k must be in [0, {numel}], got {number}")
    return number


def thread_count(threads: object) -> int | None:
    """Returns ``threads`` as an int, or None. Raises when it is below 1 or above 4096."""
    if threads is None:
        return None
    number = integer("threads", threads)
    if number < 1:
        raise ValueError(f"threads must be at least 1, got {number}")
    if number > _MOST_THREADS:
        raise ValueError(f"threads must be at most {_MOST_THREADS}, got {number}")
    return number


def pairs(suffix: str, values: Tensor, indices: Tensor, device: torch.device) -> None:
    """Checks the arrays of one sparse gradient. :func:`index_order` checks the contents of the indices.

    ``suffix`` ends the names of both in messages.
    """
    array(f"indices{suffix}", indices, I32, device)
    array(f"values{suffix}", values, F32, device, indices.numel())


def index_order(name: str, indices: Tensor, numel: int | None) -> None:
    """Raises unless ``indices`` ascend, are unique and not negative, and end with the padding.

    With ``numel`` they must also be below it. On CUDA nothing is checked, since that would wait for the
    device.
    """
    if indices.device.type != "cpu" or not indices.numel():
        return
    if int(indices[0]) < 0 or bool(((indices[1:] <= indices[:-1]) & (indices[1:] != PAD)).any()):
        raise ValueError(f"{name} must be ascending, unique and not negative, with padding at the end")
    if numel is not None:
        largest = int(torch.where(indices == PAD, -1, indices).max())
        if largest >= numel:
            raise ValueError(f"{name} must be below {numel}, got {largest}")


def row_order(indices: Tensor, numel: int) -> None:
    """Does :func:`index_order` for every row of ``indices`` ``(m, k)``."""
    for row in indices:
        index_order("indices", row, numel)


def rows(values: Tensor, indices: Tensor, name: str, out: Tensor) -> tuple[Tensor, Tensor]:
    """Checks the pairs that are added into ``out`` and returns them as ``(m, k)`` rows.

    ``name`` is the name of ``out`` in messages.
    """
    for own, tensor, dtypes in (("values", values, F32), ("indices", indices, I32)):
        _typed(own, tensor, dtypes)
        _placed(own, tensor, out.device)
    if values.shape != indices.shape or values.dim() not in (1, 2):
        raise ValueError(
            f"values and indices must have one shape, (k,) or (m, k), got {tuple(values.shape)} and "
            f"{tuple(indices.shape)}"
        )
    if values.dim() == 1:
        values, indices = values[None], indices[None]
    if values.shape[1] > 1 and not values.stride(1) == indices.stride(1) == 1:
        raise ValueError(
            f"rows of values and indices must be contiguous, got strides {values.stride()}, "
            f"{indices.stride()}"
        )
    if max(values.shape) >= PAD:
        raise ValueError(f"values must have fewer than 2**31 - 1 rows and columns, got {tuple(values.shape)}")
    if out.dtype != torch.float32 and values.shape[0] > 1:
        raise ValueError(f"values must be one row for {out.dtype}, got {values.shape[0]} rows")
    no_overlap([(name, out)], [("values", values), ("indices", indices)])
    return values, indices
