"""Copies between a GPU and a transport on the host, with the CPU in the place of the GPU.

The stand-in for page-locked memory takes a queued copy only when the stream is waited for, and holds NaN or -1 until
then: what is used too early gives wrong results.
"""

import threading
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from ranks import SCHEMES, assert_same_bits, run_steps

from commhooks import ErrorFeedback
from commhooks.transports import device_copy, in_process

of_thread = threading.local()  # ranks are threads


@pytest.fixture
def calls(monkeypatch):
    """As if every tensor were on a GPU and every transport on the host; counts what is asked of CUDA."""
    counted, lock = Counter(), threading.Lock()
    blocks = []  # kept, so that no other tensor gets the address of one

    def count(what):
        with lock:
            counted[what] += 1

    def on_host(like):
        count("page-locked")
        fill = torch.nan if like.dtype.is_floating_point else 255 if like.dtype == torch.uint8 else -1
        block = torch.full_like(like, fill)
        blocks.append(block)
        return block

    def queue_copy(target, source):
        to_host, from_host = (any(t is block for block in blocks) for t in (target, source))
        assert to_host != from_host or not target.numel()
        if to_host:
            of_thread.__dict__.setdefault("late", []).append((target, source.clone()))
        else:
            count("copies back")
            target.copy_(source)

    def wait(device):
        count("waits")
        late, of_thread.late = of_thread.__dict__.get("late", []), []
        for host, source in late:
            host.copy_(source)

    plain_to = torch.Tensor.to

    def to(tensor, *arguments, **options):
        moves = bool(arguments) and isinstance(arguments[0], (torch.device, str))
        if moves and tensor.dtype == torch.float32:  # a mask drawn on the host moves its int32 like this
            count("other moves")
        return plain_to(tensor, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(device_copy, "is_foreign", lambda buffer, device_type: True)
    monkeypatch.setattr(device_copy, "_on_host", on_host)
    monkeypatch.setattr(device_copy, "_queue_copy", queue_copy)
    monkeypatch.setattr(device_copy, "_wait_for_stream", wait)
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
    copied = run_steps(3, scheme, 0.1, gradients, **options)
    assert calls["waits"] and calls["page-locked"] and calls["copies back"] and not calls["other moves"]
    monkeypatch.undo()
    plain = run_steps(3, scheme, 0.1, gradients, **options)
    for step_a, step_b in zip(copied, plain, strict=True):
        for a, b in zip(step_a, step_b, strict=True):
            assert_same_bits(a.output, b.output)
            assert_same_bits(a.residual, b.residual)
            assert_same_bits(a.velocity, b.velocity)


@pytest.mark.parametrize(
    "scheme, waits, page_locked, back", [("union", 1, 2, 1), ("gtopk", 1, 2, 1), ("dense", 1, 1, 1)]
)
def test_copies_of_a_step(scheme, waits, page_locked, back, calls):
    """Two ranks: one message goes to the host and one comes back, each in one copy, behind one wait.

    The settings that the ranks compare at a new bucket are a message there and one back themselves.
    """
    run_steps(2, scheme, 0.1, integer_gradients(2, 60, steps=1))
    agreement = {"waits": 1, "page-locked": 2, "copies back": 1}
    step = {"waits": waits, "page-locked": page_locked, "copies back": back}
    assert calls == {what: 2 * (agreement[what] + step[what]) for what in step}


def test_several_messages_are_waited_for_once(calls):
    """At four ranks a low-bit exchange sends three messages to owners: three copies, one wait."""

    def work(transport):
        before = calls["waits"]
        peers = [rank for rank in range(4) if rank != transport.rank]
        sent = {rank: torch.full((3,), float(10 * transport.rank + rank)) for rank in peers}
        received = {rank: torch.zeros(3) for rank in peers}
        transport.exchange(list(sent.items()), list(received.items()), tag=0, what="to owners")
        for rank, found in received.items():
            assert torch.equal(found, torch.full((3,), float(10 * rank + transport.rank)))
        return before

    in_process.run(4, work)
    assert calls == {"waits": 4, "page-locked": 4 * 6, "copies back": 4 * 3}


def test_nothing_is_copied_for_one_rank(calls):
    for scheme in SCHEMES:
        run_steps(1, scheme, 0.1, integer_gradients(1, 60, steps=1))
    assert not calls


def test_only_what_is_elsewhere_is_copied():
    """NCCL sends from the GPU, gloo from the host."""
    host = torch.empty(0)
    gpu = SimpleNamespace(device=torch.device("cuda", 1))
    assert device_copy.is_foreign(gpu, "cpu") and device_copy.is_foreign(host, "cuda")
    assert not device_copy.is_foreign(host, "cpu") and not device_copy.is_foreign(gpu, "cuda")
    with pytest.raises(TypeError, match="meta"):
        device_copy.is_foreign(torch.empty(0, device="meta"), "cpu")
    copies = device_copy.Copies("cpu")
    assert copies.outgoing(host) is copies.incoming(host) is copies.both(host) is host
    (transport,) = in_process.group(1)
    buffer = torch.ones(3)
    transport.all_reduce(buffer, tag=0, what="one rank")
    assert buffer.tolist() == [1.0] * 3


def test_page_locked_memory_is_asked_for(monkeypatch):
    asked, like = {}, torch.zeros(7, dtype=torch.int32)
    monkeypatch.setattr(torch, "empty", lambda shape, **options: asked.update(shape=shape, **options))
    device_copy._on_host(like)
    assert asked == {"shape": (7,), "dtype": torch.int32, "device": "cpu", "pin_memory": True}


def test_the_stream_of_the_device_is_waited_for(monkeypatch):
    waited = []

    class Stream:
        def __init__(self, device):
            self.device = device

        def synchronize(self):
            waited.append(self.device)

    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    device_copy._wait_for_stream(torch.device("cuda", 1))
    assert waited == [torch.device("cuda", 1)]


def test_a_barrier_sends_from_where_the_transport_does(monkeypatch):
    """A byte on the host would be copied to the GPU and back in every round, or refused."""
    made, plain = [], torch.zeros

    def zeros(*shape, device=None, **options):
        made.append(device)
        return plain(*shape, **options)

    def work(transport):
        transport.device_type = "cuda"
        monkeypatch.setattr(device_copy, "is_foreign", lambda buffer, device_type: False)
        transport.barrier(tag=0, what="leaving")

    monkeypatch.setattr(torch, "zeros", zeros)
    in_process.run(3, work)
    assert made == ["cuda"] * 3
