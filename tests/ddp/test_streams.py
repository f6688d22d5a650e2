"""On which stream a bucket's future is completed, with stand-ins for the streams and events of a GPU."""

from contextlib import contextmanager

import pytest
import torch

from commhooks import AllGather, ErrorFeedback, NonFiniteGradientError, SparseState, TopK
from commhooks.ddp import state as module
from commhooks.transports import in_process

WEIGHT = torch.nn.Parameter(torch.zeros(4))


@pytest.fixture
def log(monkeypatch):
    """What happens around a bucket's exchange, in order."""
    seen = []

    @contextmanager
    def stream_after(ready, buffer):
        assert ready == "full"
        seen.append("on the stream")
        yield
        seen.append("off the stream")

    monkeypatch.setattr(module, "ready_event", lambda buffer: "full")
    monkeypatch.setattr(module, "stream_after", stream_after)
    monkeypatch.setattr(module, "drain", lambda device, limit_s: seen.append(f"drained {limit_s > 0}"))
    plain = module.Future.set_result

    def set_result(future, value):
        seen.append("result")
        plain(future, value)

    monkeypatch.setattr(module.Future, "set_result", set_result)
    return seen


def new_state(**options):
    (transport,) = in_process.group(1)
    return SparseState(TopK(0.5), AllGather(transport), ErrorFeedback(), dense_crossover=False, **options)


def test_the_result_is_set_on_the_stream_of_the_exchange(log):
    state = new_state()
    assert state.submit(torch.ones(4), 0, (WEIGHT,), True).wait().tolist() == [1.0, 1.0, 0.0, 0.0]
    state.close()
    assert log == ["on the stream", "result", "off the stream"]


def test_after_an_error_the_stream_is_drained_before_the_result_is_set(log):
    """The user who catches the error may zero the gradients at once: nothing may still write into them."""
    state = new_state(nonfinite="error")
    done = state.submit(torch.full((4,), torch.nan), 0, (WEIGHT,), True)
    with pytest.raises(Exception, match="non-finite gradient elements"):
        done.wait()
    state.close()
    assert isinstance(state.error, NonFiniteGradientError)
    assert log == ["on the stream", "drained True", "result", "off the stream"]


def test_a_device_that_fails_itself_completes_the_future_too(log, monkeypatch):
    """DDP would wait for ever."""

    @contextmanager
    def fails(ready, buffer):
        raise RuntimeError("CUDA error: an illegal memory access")
        yield

    monkeypatch.setattr(module, "stream_after", fails)
    state = new_state()
    done = state.submit(torch.ones(4), 0, (WEIGHT,), True)
    with pytest.raises(Exception, match="illegal memory access"):
        done.wait()
    assert log == ["result"] and "illegal memory access" in str(state.error)
    state.close()


def test_a_captured_step_is_refused_before_the_bucket_is_queued(monkeypatch):
    def captured(buffer):
        raise RuntimeError("cannot be captured into a CUDA graph")

    state = new_state()
    monkeypatch.setattr(module, "ready_event", captured)
    with pytest.raises(RuntimeError, match="cannot be captured"):
        state.submit(torch.ones(4), 0, (WEIGHT,), True)
    monkeypatch.undo()
    assert state.error is None
    assert state.submit(torch.ones(4), 0, (WEIGHT,), True).wait().tolist() == [1.0, 1.0, 0.0, 0.0]
    state.close()
