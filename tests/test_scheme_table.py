"""The table of schemes, and what ``memory=None`` means wherever a memory can be given."""

import inspect
import re
import warnings

import pytest

from commhooks import (
    AllGather,
    Dense,
    ErrorFeedback,
    GTopK,
    LowBit,
    NoMemory,
    RandomK,
    Reducer,
    SharedIndices,
    SparseState,
    ThresholdTopK,
    TopK,
)
from commhooks.planner import cost_model, plan
from commhooks.schemes import SCHEMES, check_scheme, make_parts

KINDS = {
    "dense": (type(None), Dense, NoMemory),
    "topk": (TopK, AllGather, ErrorFeedback),
    "gtopk": (TopK, GTopK, ErrorFeedback),
    "gtopk-tree": (TopK, GTopK, ErrorFeedback),
    "randomk": (RandomK, SharedIndices, ErrorFeedback),
    "threshold": (ThresholdTopK, AllGather, ErrorFeedback),
    "lowbit": (type(None), LowBit, ErrorFeedback),
}


def kinds(parts):
    return tuple(type(part) for part in parts)


def test_every_scheme_is_what_its_name_says():
    assert {name: kinds(make_parts(name, 0.1)) for name in SCHEMES} == KINDS
    for name in SCHEMES:
        selector, aggregator, _ = make_parts(name, 0.1, "mpi", seed=5)
        check_scheme(selector, aggregator)
        assert aggregator.requested == "mpi"
    assert make_parts("gtopk-tree", 0.1)[1].algorithm == "tree"
    assert make_parts("gtopk", 0.1)[1].algorithm == "doubling"
    assert make_parts("randomk", 0.1, seed=5)[0].seed == 5


def test_a_memory_of_ones_own_replaces_the_schemes():
    own = ErrorFeedback(0.5)
    assert make_parts("topk", 0.1, memory=own)[2] is own
    assert make_parts("topk", 0.1)[2] is not make_parts("topk", 0.1)[2]


def test_short_forms_are_rows_of_the_table():
    states = {
        "topk": SparseState.topk(0.1),
        "gtopk": SparseState.gtopk(0.1),
        "randomk": SparseState.randomk(0.1, seed=4),
        "dense": SparseState.dense(),
        "lowbit": SparseState.lowbit(),
    }
    for name, state in states.items():
        reducer = state.reducer
        assert kinds((reducer.selector, reducer.aggregator, reducer.memory)) == KINDS[name], name
    assert states["randomk"].reducer.selector.seed == 4


def test_the_planners_names_are_rows_of_the_table():
    assert set(plan.CANDIDATES) | set(plan.SAFE) | set(plan.ADAPTIVE) <= set(cost_model.SCHEMES)
    for name in cost_model.SCHEMES:
        bits = cost_model.LOW_BIT.get(name)
        if bits is None:
            assert name in SCHEMES
        else:
            assert name == f"lowbit{bits}" and "lowbit" in SCHEMES
            assert LowBit(bits).bits == bits


@pytest.mark.parametrize(
    "arguments, words",
    [(("topk2", 0.1), ["scheme", "topk2", "gtopk-tree"]), (("topk", None), ["density", "topk", "None"])],
)
def test_a_name_or_density_that_is_none_is_refused(arguments, words):
    with pytest.raises(ValueError) as error:
        make_parts(*arguments)
    assert all(word in str(error.value) for word in words)


MAKERS = {
    "SparseState.lowbit": lambda **more: SparseState.lowbit(**more).reducer.memory,
    "SparseState": lambda **more: SparseState(TopK(0.1), AllGather(), **more).reducer.memory,
    "SparseState.topk": lambda **more: SparseState.topk(0.1, **more).reducer.memory,
    "Reducer": lambda **more: Reducer(TopK(0.1), AllGather(), **more).memory,
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_no_memory_given_and_none_given_are_the_same_everywhere(make):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert type(make()) is ErrorFeedback
        assert type(make(memory=NoMemory())) is NoMemory
    with pytest.warns(FutureWarning, match=re.escape("NoMemory()")):
        assert type(make(memory=None)) is ErrorFeedback
    with pytest.raises(TypeError, match="memory must be a Memory.*float"):
        make(memory=0.9)


def test_dense_withholds_nothing_unless_asked():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # None meant no memory here before too
        assert type(Reducer(None, Dense(), None).memory) is NoMemory
    assert type(SparseState.dense(memory=ErrorFeedback(0.5)).reducer.memory) is ErrorFeedback


def test_signatures_show_the_default_as_none():
    for call in (SparseState, Reducer):
        assert repr(inspect.signature(call).parameters["memory"].default) == "None"
