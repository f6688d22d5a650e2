"""Waits end by the time in which the process ran."""

from commhooks.transports import deadline


def clock(monkeypatch, times):
    readings = iter(times)
    monkeypatch.setattr(deadline.time, "monotonic", lambda: next(readings))


def test_it_passes_after_its_time_of_polls(monkeypatch):
    clock(monkeypatch, [0.0, 0.4, 0.8, 1.2, 1.6, 2.1, 2.2])
    wait = deadline.Deadline(2.0)
    assert [wait.has_passed() for _ in range(6)] == [False] * 4 + [True] * 2


def test_hours_in_which_the_process_was_stopped_count_as_one_pause(monkeypatch):
    clock(monkeypatch, [0.0, 0.5, 7200.5, 7200.6, 7201.0, 7203.1])
    wait = deadline.Deadline(4.0)
    assert [wait.has_passed() for _ in range(4)] == [False] * 4
    assert not wait.has_passed()  # 0.5 + 1 + 0.1 + 0.4 + 1: the last pause counts as one second too


def test_a_short_limit_survives_one_stop(monkeypatch):
    clock(monkeypatch, [0.0, 100.0, 200.0, 300.0, 400.0, 500.0])
    wait = deadline.Deadline(0.4)
    assert [wait.has_passed() for _ in range(5)] == [False] * 4 + [True]
