"""A checkpoint says what its numbers mean. One that does not fit is an error unless asked, or converted."""

import io

import pytest
import torch
from ranks import NAMES, integers, reducer, step

from commhooks import (
    AllGather,
    Bucket,
    ErrorFeedback,
    LowBit,
    NoMemory,
    RandomK,
    Reducer,
    SharedIndices,
    SparseState,
    TopK,
)
from commhooks.transports import in_process


class Scaler:
    """Stands in for a GradScaler."""

    def get_scale(self):
        return 4.0

    def is_enabled(self):
        return True


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def saved_by(transport, scheme="union", memory=None):
    red = reducer(scheme, transport, 0.1, memory or ErrorFeedback(0.9))
    step(red, [integers(torch.Generator().manual_seed(i), 20) for i in range(len(NAMES))])
    return through_a_file(red.state_dict())


def alone(work):
    return in_process.run(1, work)[0]


def test_a_checkpoint_says_what_made_it():
    saved = alone(saved_by)
    assert saved["version"] == 2
    assert saved["scheme"] == {
        "selector": "TopK",
        "aggregator": "AllGather",
        "memory": "ErrorFeedback",
        "momentum": 0.9,
        "nesterov": False,
    }


def test_topk_with_momentum_into_another_scheme():
    """Into random-k, with or without momentum, and into no memory: an error, nothing is touched."""

    def work(transport):
        saved = saved_by(transport)
        for selector, memory, text in (
            (RandomK(0.5), ErrorFeedback(0.9), "random-k diverges with momentum .saved by TopK, AllGather"),
            (RandomK(0.5), ErrorFeedback(), "velocities would be lost .saved by .*momentum 0.9"),
            (RandomK(0.5), NoMemory(), "residuals of 4 parameters would be lost.*velocities would be lost"),
        ):
            red = Reducer(selector, SharedIndices(transport), memory)
            with pytest.raises(ValueError, match=text + r".*strict=False"):
                red.load_state_dict(saved)
            with pytest.raises(ValueError, match=text):
                red.load_state_dict([saved])
            assert red.step == 0 and not red.state_dict()["residual"]
            red.load_state_dict(saved, strict=False)
            assert red.step == 1
            assert bool(red.state_dict()["residual"]) == (not isinstance(memory, NoMemory))
        for scheme, memory in (("union", ErrorFeedback(0.5)), ("gtopk", ErrorFeedback(0.9))):
            reducer(scheme, transport, 0.5, memory).load_state_dict(saved)  # these fit
        same = saved_by(transport, "shared", ErrorFeedback(0.9))  # it had what it asks for
        Reducer(RandomK(0.5), SharedIndices(transport), ErrorFeedback(0.9)).load_state_dict(same)

    alone(work)


def test_a_format_of_a_later_version_is_refused():
    def work(transport):
        saved = {**saved_by(transport), "version": 3}
        for strict in (True, False):
            with pytest.raises(ValueError, match="format version 3 and .* reads up to 2"):
                reducer("union", transport, 0.1, ErrorFeedback(0.9)).load_state_dict(saved, strict=strict)

    alone(work)


@pytest.mark.parametrize("before, after", [(True, False), (False, True), (True, True)])
def test_velocities_are_converted_between_nesterov_and_polyak(before, after):
    """The run that goes on with another form has the velocity that this form would have had."""
    gradients = [torch.tensor([1.0, -3.0, 2.0, 0.5]), torch.tensor([0.0, 1.0, 1.0, -1.0])]

    def work(transport):
        def run(red, gradient):
            buffer = gradient.clone()
            red.reduce(Bucket(0, buffer, ("p",), (4,)))
            return buffer

        def make(nesterov):
            memory = ErrorFeedback(0.5, nesterov=nesterov)
            return Reducer(TopK(1.0), AllGather(transport), memory, dense_crossover=False)

        first, expected, second = make(before), make(after), make(after)
        run(first, gradients[0])
        run(expected, gradients[0])  # everything is sent: the velocity is all that is kept
        second.load_state_dict(first.state_dict())
        torch.testing.assert_close(run(second, gradients[1]), run(expected, gradients[1]))

    alone(work)


def test_what_owners_kept_goes_on_without_owners():
    """From low-bit to top-k: the owner's memory joins the residual, and the mean over ranks is kept."""

    def work(transport):
        first = Reducer(None, LowBit(2, transport), dense_crossover=False)
        gradient = torch.randn(600, generator=torch.Generator().manual_seed(transport.rank))
        first.reduce(Bucket(0, gradient, ("p",), (600,)))
        saved = through_a_file(first.state_dict())
        assert saved["owned"]
        second = Reducer(TopK(1.0), AllGather(transport), dense_crossover=False)
        second.load_state_dict(saved)
        again = second.state_dict()
        assert "owned" not in again
        zeros = torch.zeros(600)
        zeros[0] = 1e-3  # a gradient of zeros alone is inactive
        second.reduce(Bucket(0, zeros, ("p",), (600,)))
        owned = torch.zeros(600)
        for start, kept in saved["owned"]["p"].items():
            owned[start : start + kept.numel()] = kept
        return saved["residual"]["p"], owned, zeros, second.state_dict()["residual"]["p"]

    ranks = in_process.run(2, work)
    owed = sum(r[0] for r in ranks) / 2 + sum(r[1] for r in ranks)
    owed[0] += 1e-3
    torch.testing.assert_close(ranks[0][2], owed)
    assert not any(r[3].any() for r in ranks)


def units_of(scaler, transport):
    return SparseState(TopK(0.5), AllGather(transport), grad_scaler=scaler)


def test_units_that_differ_are_an_error_unless_asked():
    """With ``grad_scaler`` the memory is of unscaled gradients, without one of scaled ones."""

    def work(transport):
        weight = torch.nn.Parameter(torch.zeros(4))
        scaled = torch.tensor([4.0, 3.0, 2.0, 1.0])
        saved = {}
        for scaler in (Scaler(), None):
            state = units_of(scaler, transport)
            state.set_names([("w", weight)])
            state.submit(scaled.clone(), 0, (weight,), True).wait()
            saved[scaler is not None] = through_a_file(state.state_dict())
            state.close()
        assert saved[True]["units"] == "unscaled" and saved[False]["units"] == "as given"
        assert torch.equal(saved[False]["residual"]["w"], 4 * saved[True]["residual"]["w"])
        for here in (True, False):
            text = "pass grad_scaler=scaler, or GradScaler.enabled=False" if not here else "divide residuals"
            for wrong in (saved[not here], [saved[not here]]):
                state = units_of(Scaler() if here else None, transport)
                with pytest.raises(ValueError, match=text + ".*strict=False"):
                    state.load_state_dict(wrong)
                assert state.reducer.step == 0
                state.load_state_dict(wrong, strict=False)
                state.load_state_dict(saved[here])
                version_1 = {k: v for k, v in saved[not here].items() if k not in ("units", "scheme")}
                state.load_state_dict({**version_1, "version": 1})  # it does not tell
                state.close()
        switched_off = units_of(torch.amp.GradScaler("cpu", enabled=False), transport)
        switched_off.load_state_dict(saved[True])
        switched_off.close()

    alone(work)
