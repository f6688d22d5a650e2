"""A rank that dies or stalls, over in_process: typed errors that name rank and bucket, and nothing hangs."""

import threading
import time

import pytest
import torch
from ranks import ALL_SCHEMES, memory_of, reducer

from commhooks import (
    Bucket,
    CommHooksError,
    ErrorFeedback,
    NonFiniteGradientError,
    PeerLostError,
    PeerTimeoutError,
    SettingsMismatchError,
    SparseState,
)
from commhooks.reduction.step import Step
from commhooks.transports import in_process


def break_at(transport, bucket, action):
    """Does ``action`` on rank 1 just before its first message of this bucket in the second step."""
    exchange, seen = transport.move, []

    def wrapped(sends, receives, tag, what):
        if what.startswith(f"bucket {bucket}, step 1") and not seen:
            seen.append(what)
            action()
        exchange(sends, receives, tag, what)

    if transport.rank == 1:
        transport.move = wrapped


def two_steps(transport, scheme):
    red = reducer(scheme, transport, 0.5)
    for step in range(2):
        for index in range(3):
            red.reduce(Bucket(index, torch.ones(6), (f"p{index}",), (6,), index == 2))


@pytest.mark.parametrize("scheme", ALL_SCHEMES)
def test_a_rank_that_dies_in_mid_step(scheme):
    errors = {}

    class Died(Exception):
        pass

    def die():
        raise Died("gone")

    def work(transport):
        break_at(transport, 1, die)
        try:
            two_steps(transport, scheme)
        except BaseException as error:
            errors[transport.rank] = error
            raise

    started = time.monotonic()
    with pytest.raises(Died):
        in_process.run(3, work, timeout_s=20.0)
    assert time.monotonic() - started < 5.0
    for rank in (0, 2):
        assert isinstance(errors[rank], PeerLostError) and "bucket 1, step 1" in str(errors[rank])
        assert f"rank {rank}" in str(errors[rank])


@pytest.mark.parametrize("scheme", ALL_SCHEMES)
def test_a_rank_that_stalls_in_mid_step(scheme):
    errors, wake = {}, threading.Event()

    def work(transport):
        break_at(transport, 1, lambda: wake.wait(20.0))
        try:
            two_steps(transport, scheme)
        except BaseException as error:
            errors[transport.rank] = error
            if transport.rank != 1:
                wake.set()
            raise

    started = time.monotonic()
    with pytest.raises(PeerTimeoutError, match=r"rank \d, bucket 1, step 1.*nothing from rank \d within 1 s"):
        in_process.run(3, work, timeout_s=1.0)
    assert time.monotonic() - started < 15.0
    assert {type(error) for error in errors.values()} <= {PeerTimeoutError, PeerLostError}
    first = next(e for e in errors.values() if isinstance(e, PeerTimeoutError))
    assert "from rank 1" in str(first) or scheme.startswith("gtopk")


def test_errors_are_what_they_say():
    for error in (PeerTimeoutError, PeerLostError, SettingsMismatchError, NonFiniteGradientError):
        assert issubclass(error, CommHooksError) and issubclass(error, RuntimeError) and error.__doc__
    assert issubclass(SettingsMismatchError, ValueError)


def test_transports_of_any_kind_give_the_same_sums():
    """all-gather, all-reduce and broadcast of the in-process transport, at every root."""
    for world_size in (1, 2, 3, 5, 8):

        def work(transport):
            rank = transport.rank
            mine = torch.arange(3, dtype=torch.float32) + rank
            rows = torch.empty(transport.world_size, 3)
            transport.all_gather(mine, rows, tag=0, what="gather")
            total = mine.clone()
            transport.all_reduce(total, tag=1, what="sum")
            copies = []
            for root in range(transport.world_size):
                buffer = torch.tensor([rank])
                transport.broadcast(buffer, root=root, tag=2, what="copy")
                copies.append(buffer.item())
            return rows, total, copies

        expected = torch.stack([torch.arange(3.0) + r for r in range(world_size)])
        for rows, total, copies in in_process.run(world_size, work):
            assert torch.equal(rows, expected) and torch.equal(total, expected.sum(0))
            assert copies == list(range(world_size))


@pytest.mark.parametrize("scheme", ["union", "gtopk", "shared"])
def test_restarted_after_a_failed_step_it_is_as_if_nothing_had_failed(scheme):
    """The second bucket of a step fails on every rank; back at what was saved before, another step is made."""
    names = ["p0", "p1"]

    def gradient(rank, step, index):
        return torch.randn(40, generator=torch.Generator().manual_seed(100 * rank + 10 * step + index))

    def work(transport, fails):
        parameters = [torch.nn.Parameter(torch.zeros(40)) for _ in names]
        selector, aggregator = ALL_SCHEMES[scheme](transport, 0.1)
        state = SparseState(
            selector, aggregator, ErrorFeedback(momentum=0.5, factor_masking=True), dense_crossover=False
        )

        def step(number, bad=None):
            outs = []
            for index in range(2):
                buffer = gradient(transport.rank, number, index)
                if index == bad:
                    buffer = buffer.to(
                        torch.int32
                    )  # refused on every rank, after the first bucket went through
                outs.append(state.submit(buffer, index, (parameters[index],), index == 1))
            return [out.wait() for out in outs]

        state.set_names(zip(names, parameters, strict=True))
        state.reducer.open()
        done = [step(0), step(1)]
        saved = state.state_dict()
        if fails:
            with pytest.raises((RuntimeError, TypeError), match="int32"):
                step(2, bad=1)
            assert state.error is not None
            state.restart(saved)
            assert state.error is None
        done += [step(4), step(3)]
        state.close()
        return done, memory_of(state.reducer, names)

    for whole, broken in zip(
        in_process.run(2, lambda t: work(t, False)), in_process.run(2, lambda t: work(t, True)), strict=True
    ):
        for a, b in zip(whole[0], broken[0], strict=True):
            for x, y in zip(a, b, strict=True):
                assert torch.equal(x, y)
        for x, y in zip(whole[1], broken[1], strict=True):
            assert torch.equal(x, y)


def test_skipped_buckets_are_logged_once_in_full_and_then_counted(caplog):
    step = Step("skip")
    for i in range(25):
        step.throw_away(torch.ones(2), 0, f"step {i}", rank=0)
        step.finish()
    texts = [record.getMessage() for record in caplog.records]
    assert texts == [
        "step 0; its update is skipped on all ranks",
        "step 9; 10 updates of buckets skipped so far",
    ]
    assert step.nonfinite_steps == 25
