"""What a call says about arguments that it does not have, and how states and plans print."""

import pytest
import torch

from commhooks import (
    AllGather,
    ErrorFeedback,
    ExponentialWarmup,
    GTopK,
    Reducer,
    SparseState,
    ThresholdTopK,
    TopK,
)
from commhooks.averaging import BlockMomentum, DiLoCo, LocalSGD
from commhooks.errors import environment_choice, says_what_to_write

CALLS = [
    (
        lambda: SparseState.topk(0.01, momentum=0.9),
        "SparseState.topk",
        "write memory=ErrorFeedback(momentum=0.9)",
    ),
    (lambda: SparseState.topk(ratio=0.01), "SparseState.topk", "write density=0.01"),
    (lambda: SparseState.gtopk(0.01, timeout=5), "SparseState.gtopk", "write timeout_s=5"),
    (lambda: SparseState.randomk(0.01, sead=5), "SparseState.randomk", "did you mean seed=5?"),
    (
        lambda: SparseState.dense(clip_norm=1.0),
        "SparseState.dense",
        "write memory=ErrorFeedback(clip_norm=1.0)",
    ),
    (
        lambda: SparseState.auto(10**6, non_finite="skip"),
        "SparseState.auto",
        "did you mean nonfinite='skip'?",
    ),
    (lambda: SparseState(TopK(0.1), AllGather(), momentum=0.9), "SparseState", "ErrorFeedback(momentum=0.9)"),
    (lambda: Reducer(TopK(0.1), AllGather(), averages=False), "Reducer", "did you mean average=False?"),
    (
        lambda: Reducer(TopK(0.1), AllGather(), colour="red"),
        "Reducer",
        "(got 'red'); it has selector, aggregator",
    ),
    (lambda: ErrorFeedback(clip=1.0), "ErrorFeedback", "did you mean clip_norm=1.0?"),
    (lambda: TopK(ratio=0.01), "TopK", "write density=0.01"),
    (lambda: ThresholdTopK(k=5), "ThresholdTopK", "write density=0.01, the share"),
    (lambda: ExponentialWarmup(0.1, warmup=5), "ExponentialWarmup", "write warmup_steps=5"),
    (lambda: GTopK(backend="mpi"), "GTopK", "write transport='mpi'"),
    (lambda: AllGather(backend="mpi"), "AllGather", "write transport='mpi'"),
    (lambda: LocalSGD(H=4), "LocalSGD", "write period=4"),
    (lambda: LocalSGD(4, timeout=5), "LocalSGD", "write timeout_s=5"),
    (
        lambda: BlockMomentum([torch.zeros(1)], 0.9, 4, buffer="mean"),
        "BlockMomentum",
        "did you mean buffers='mean'?",
    ),
    (lambda: DiLoCo([torch.zeros(1)], None, period=4), "DiLoCo", "write sync_every=4"),
]


@pytest.mark.parametrize("call, name, advice", CALLS, ids=[c[1] + ": " + c[2] for c in CALLS])
def test_an_unknown_argument_is_told_what_to_write(call, name, advice):
    with pytest.raises(TypeError) as error:
        call()
    assert str(error.value).startswith(f"{name}() has no argument ") and advice in str(error.value)


def test_errors_of_the_call_itself_pass():
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'density'"):
        SparseState.topk()
    with pytest.raises(ValueError, match="density must be in"):
        SparseState.topk(2.0, timeout_s=5.0)


def test_a_class_that_takes_any_option_is_asked_itself():
    class Own(SparseState):
        def __init__(self, selector, aggregator, memory=None, **more):
            self.more = more
            super().__init__(selector, aggregator, ErrorFeedback())

    assert Own.topk(0.1, colour="red").more == {"colour": "red"}

    class Named(SparseState):
        def __init__(self, selector, aggregator, memory=None, *, colour="blue"):
            self.colour = colour
            super().__init__(selector, aggregator, ErrorFeedback())

    assert Named.topk(0.1, colour="red").colour == "red"
    with pytest.raises(TypeError, match="timeout_s"):
        Named.topk(0.1, timeout_s=1.0)


def test_a_plain_function_has_its_first_argument_too():
    @says_what_to_write
    def work(first, *, second=2):
        return first + second

    assert work(first=1) == 3 and work(1, second=3) == 4
    with pytest.raises(TypeError, match="did you mean second=5"):
        work(1, secnd=5)


def test_a_warning_names_the_line_of_the_user():
    with pytest.warns(DeprecationWarning, match="period=") as caught:
        LocalSGD(sync=4)
    assert caught[0].filename == __file__


def test_an_environment_variable_is_one_of_its_values(monkeypatch):
    monkeypatch.delenv("COMMHOOKS_COLOUR", raising=False)
    assert environment_choice("COMMHOOKS_COLOUR", ("red", "blue"), "red") == "red"
    for value, expected in (("", "red"), ("blue", "blue")):
        monkeypatch.setenv("COMMHOOKS_COLOUR", value)
        assert environment_choice("COMMHOOKS_COLOUR", ("red", "blue"), "red") == expected
    monkeypatch.setenv("COMMHOOKS_COLOUR", "Blue ")
    with pytest.raises(ValueError, match="COMMHOOKS_COLOUR must be one of red, blue, got 'Blue '"):
        environment_choice("COMMHOOKS_COLOUR", ("red", "blue"), "red")


def test_a_state_prints_its_parts_and_how_far_it_is():
    state = SparseState.topk(0.01, memory=ErrorFeedback(momentum=0.9))
    assert repr(state) == str(state)
    for part in (
        "TopK(density=0.01)",
        "AllGather()",
        "ErrorFeedback(momentum=0.9",
        "transport 'distributed'",
        "step 0",
    ):
        assert part in repr(state)
    state.error = RuntimeError("lost")
    assert repr(state).endswith(", failed: RuntimeError: lost)")
    assert "averaged by DDP's own all-reduce" in repr(SparseState.dense(ddp_allreduce=True))
