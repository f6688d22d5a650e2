"""Staging between a GPU and a transport on the host, with the CPU in the part of the GPU.

The stand-in for page-locked memory takes a copy that does not block only when the stream is waited for, and holds NaN or
-1 until then: what is used too early gives wrong results.
"""

import threading
from collections import Counter

import pytest
import torch
from ranks import SCHEMES, assert_same_bits, run_steps

from commhooks import ErrorFeedback, SparseGrad
from commhooks.gradient import device_copy
from commhooks.transports import in_process

of_thread = threading.local()  # ranks are threads


class PageLocked(torch.Tensor):
    """A tensor of the host whose copies from the "GPU" are late; what is computed from it is not page-locked."""

    blocks = []

    def copy_(self, source, non_blocking=False):
        if not non_blocking:
            return super().copy_(source)
        of_thread.__dict__.setdefault("late", []).append((self, source.clone()))
        return self

    def is_pinned(self):
        return self.numel() > 0 and any(
            self.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() for b in self.blocks
        )


@pytest.fixture
def calls(monkeypatch):
    """As if every tensor were on both sides at once; counts what is asked of CUDA."""
    counted = Counter()

    def page_locked(numel, dtype):
        counted["page-locked"] += 1
        fill = -1 if dtype == torch.int32 else torch.nan
        block = torch.full((numel,), fill, dtype=dtype).as_subclass(PageLocked)
        PageLocked.blocks.append(block)
        return block

    def wait(device):
        counted["waits"] += 1
        late, of_thread.late = of_thread.__dict__.get("late", []), []
        for host, source in late:
            torch.Tensor.copy_(host, source)

    plain_to = torch.Tensor.to

    def to(tensor, *arguments, **options):
        moves = bool(arguments) and isinstance(arguments[0], (torch.device, str))
        if moves and options.get("non_blocking"):
            counted["copies back"] += 1
        elif moves and tensor.dtype == torch.float32:  # a mask drawn on the host moves its int32 like this
            counted["blocking copies"] += 1
        with torch._C.DisableTorchFunctionSubclass():  # a subclass would come here a second time
            return plain_to(tensor, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(PageLocked, "blocks", [])
    monkeypatch.setattr(device_copy, "_crosses", lambda device, other: True)
    monkeypatch.setattr(device_copy, "_page_locked", page_locked)
    monkeypatch.setattr(device_copy, "_wait_for_copies", wait)
    return counted


def integer_gradients(world_size, n, steps=3):
    generator = torch.Generator().manual_seed(world_size)
    return [
        [torch.randint(-8, 9, (n,), generator=generator).float() for _ in range(world_size)]
        for _ in range(steps)
    ]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_gives_the_same_bits(scheme, dtype, calls, monkeypatch):
    """The whole line, there and back, delta included."""
    gradients = [[g.to(dtype) for g in step] for step in integer_gradients(3, 60)]
    options = {"segments": (40, 20), "memory": lambda: ErrorFeedback(0.5), "delta_every": 2}
    staged = run_steps(3, scheme, 0.1, gradients, **options)
    assert calls["waits"] and calls["page-locked"] and not calls["blocking copies"]
    monkeypatch.undo()
    plain = run_steps(3, scheme, 0.1, gradients, **options)
    for step_a, step_b in zip(staged, plain, strict=True):
        for a, b in zip(step_a, step_b, strict=True):
            assert_same_bits(a.output, b.output)
            assert_same_bits(a.residual, b.residual)
            assert_same_bits(a.velocity, b.velocity)


@pytest.mark.parametrize("scheme, page_locked, back", [("union", 4, 4), ("gtopk", 6, 6), ("dense", 1, 1)])
def test_copies_of_a_step(scheme, page_locked, back, calls):
    """One wait for what is sent; what comes back from page-locked memory is not copied on the host again.

    Values and indices are sent. union: the sum is the aggregator's own memory, what contributed is what was sent. gtopk of
    one rank: the sum is what was sent, what contributed and what was refused are new. dense: one buffer there and back.
    """
    run_steps(1, scheme, 0.1, integer_gradients(1, 60, steps=1))
    assert calls == {"waits": 1, "page-locked": page_locked, "copies back": back}


def test_send_buffer_leaves_places(calls):
    (transport,) = in_process.group(1)
    buffer = device_copy.send_buffer(torch.tensor([1.0, 2.0]), 1, transport)
    buffer[2] = 3.0
    assert buffer.tolist() == [1.0, 2.0, 3.0]


def test_nothing_is_staged_on_one_side():
    (transport,) = in_process.group(1)
    pairs = SparseGrad(torch.ones(2), torch.tensor([1, 4], dtype=torch.int32), 5)
    assert device_copy.to_transport(pairs, transport) is pairs
    assert device_copy.to_device(pairs.values, torch.device("cpu")) is pairs.values
    back = device_copy.pairs_to_device(pairs, torch.device("cpu"))
    assert back.values is pairs.values and back.indices is pairs.indices and back.numel == 5
    buffer = device_copy.send_buffer(pairs.values, 1, transport)
    assert buffer.data_ptr() != pairs.values.data_ptr() and buffer.shape == (3,)


def test_sides():
    """Only between a GPU and the host: NCCL sends from the GPU, gloo from the host."""
    gpu, host = torch.device("cuda", 0), torch.device("cpu")
    assert device_copy._crosses(gpu, "cpu")
    assert not device_copy._crosses(gpu, "cuda") and not device_copy._crosses(host, "cpu")
    assert not device_copy._crosses(host, "cuda")


def test_page_locked_memory_is_asked_for(monkeypatch):
    asked = {}
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: asked.update(shape=shape, **options))
    device_copy._page_locked(7, torch.int32)
    assert asked == {"shape": (7,), "dtype": torch.int32, "pin_memory": True}


def test_the_stream_of_the_device_is_waited_for(monkeypatch):
    waited = []

    class Stream:
        def __init__(self, device):
            self.device = device

        def synchronize(self):
            waited.append(self.device)

    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    device_copy._wait_for_copies(torch.device("cuda", 1))
    assert waited == [torch.device("cuda", 1)]
