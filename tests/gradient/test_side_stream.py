"""Streams and events of a GPU, by fakes: what is recorded where, and what waits for what."""

import types

import pytest
import torch

from commhooks.gradient import side_stream


class FakeStream:
    def __init__(self, device, priority=0):
        self.device, self.priority, self.log, self.capturing = device, priority, [], False

    def wait_event(self, event):
        self.log.append(("waits", event))


class FakeEvent:
    finished = True

    def __init__(self):
        self.on = None

    def record(self, stream):
        self.on = stream

    def query(self):
        return FakeEvent.finished


class FakeBuffer:
    def __init__(self, device):
        self.device, self.recorded = torch.device(device), []

    def record_stream(self, stream):
        self.recorded.append(stream)


@pytest.fixture
def cuda(monkeypatch):
    """``torch.cuda`` with two devices, each with a current stream; device 0 is the thread's."""
    current = {torch.device("cuda", i): FakeStream(torch.device("cuda", i)) for i in range(2)}

    class Within:
        inner: list = []

        def __init__(self, what):
            self.what = what

        def __enter__(self):
            Within.inner.append(self.what)
            return self.what

        def __exit__(self, *error):
            Within.inner.pop()
            return False

    def capturing():
        devices = [what for what in Within.inner if isinstance(what, torch.device)]
        return current[devices[-1] if devices else torch.device("cuda", 0)].capturing

    fakes = {
        "Event": FakeEvent,
        "Stream": FakeStream,
        "current_stream": lambda device=None: current[device or torch.device("cuda", 0)],
        "is_current_stream_capturing": capturing,
        "device": Within,
        "stream": Within,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(side_stream.torch.cuda, name, fake)
    monkeypatch.setattr(side_stream, "_of_thread", types.SimpleNamespace())
    monkeypatch.setattr(FakeEvent, "finished", True)
    return current


def test_the_event_is_recorded_on_the_buffers_device_and_not_on_the_current_one(cuda):
    buffer = FakeBuffer("cuda:1")
    assert side_stream.ready_event(buffer).on is cuda[buffer.device]


def test_the_side_stream_waits_for_the_gradient_and_keeps_its_memory(cuda):
    first, second, other = FakeBuffer("cuda:1"), FakeBuffer("cuda:1"), FakeBuffer("cuda:0")
    for buffer in (first, second, other):
        event = side_stream.ready_event(buffer)
        with side_stream.stream_after(event, buffer):
            pass
        (stream,) = buffer.recorded
        assert stream.log[-1] == ("waits", event)
        assert stream.priority == -1 and stream.device == buffer.device
    assert first.recorded == second.recorded != other.recorded  # one stream a device


def test_on_the_cpu_nothing_is_recorded(cuda):
    buffer = torch.zeros(3)
    assert side_stream.ready_event(buffer) is None
    with side_stream.stream_after(None, buffer):
        pass


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_a_captured_step_is_an_error_that_says_what_to_do(cuda, device):
    """The stream of the buffer's device is asked, which need not be the thread's current one."""
    cuda[torch.device(device)].capturing = True
    with pytest.raises(RuntimeError, match="cannot be captured into a CUDA graph.*Capture the forward"):
        side_stream.ready_event(FakeBuffer(device))
    other = FakeBuffer("cuda:1" if device == "cuda:0" else "cuda:0")
    assert side_stream.ready_event(other).on is cuda[other.device]


def test_draining_waits_for_the_stream_but_not_for_ever(cuda, monkeypatch):
    device = torch.device("cuda", 0)
    assert side_stream.drain(device, 5.0)
    monkeypatch.setattr(FakeEvent, "finished", False)
    assert not side_stream.drain(device, 0.01)
    assert side_stream.drain(torch.device("cpu"), 0.0)
