"""Late ranks by a store: exact while it answers, nobody at all when it does not, and never a hang."""

import threading

import pytest
import torch.distributed as dist

from commhooks.transports import stragglers
from commhooks.transports.stragglers import Stragglers


def test_it_names_the_ranks_that_told_of_no_wait_or_of_an_earlier_one():
    store = dist.HashStore()
    calls = [Stragglers(store, rank, 4) for rank in range(4)]
    assert calls[0].missing(1) == [1, 2, 3]
    assert calls[0].wait_in(7) and calls[2].wait_in(6) and calls[3].wait_in(10)
    assert calls[0].missing(7) == [1, 2]
    assert calls[2].wait_in(7)
    assert calls[0].missing(7) == [1] and calls[3].missing(10) == [0, 1, 2]


class Broken:
    """A store whose every call ``act`` decides."""

    def __init__(self, act):
        self.calls, self.act = 0, act

    def set(self, key, value):
        self.calls += 1
        return self.act()

    check = get = lambda self, key: self.set(key, None)


def fail():
    raise RuntimeError("connection reset")


def test_a_store_that_fails_or_hangs_is_left_alone(monkeypatch):
    monkeypatch.setattr(stragglers, "_STORE_LIMIT_S", 0.1)
    release = threading.Event()
    for act in (fail, release.wait):
        store = Broken(act)
        call = Stragglers(store, 0, 3)
        assert call.wait_in(1) is False and call.missing(1) == []
        assert store.calls == 1
        reader = Stragglers(store, 0, 3)
        assert reader.missing(1) == []
    release.set()


@pytest.mark.parametrize("number", [1, 5])
def test_without_a_store_nobody_is_missed(number):
    call = Stragglers(None, 0, 3)
    assert call.wait_in(number) is False and call.missing(number) == []
