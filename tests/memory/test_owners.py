"""A memory, and a reducer, belong to one owner: two would send each other's residuals."""

import copy
import pickle

import pytest
import torch

from commhooks import AllGather, Dense, ErrorFeedback, LowBit, NoMemory, Reducer, SparseState, TopK
from commhooks.averaging import LocalSGD
from commhooks.transports import in_process

MESSAGE = "memory belongs to another state, compression or Reducer already"


@pytest.mark.parametrize("memory", (ErrorFeedback, lambda: ErrorFeedback(0.9), NoMemory))
def test_a_memory_belongs_to_one_state_or_reducer(memory):
    makers = [
        lambda m: SparseState.topk(0.1, memory=m),
        lambda m: SparseState(TopK(0.1), AllGather(), m),
        lambda m: Reducer(TopK(0.1), AllGather(), m),
        lambda m: Reducer(None, LowBit(4), m),
        lambda m: Reducer(None, Dense(), m),
    ]
    for first in makers:
        shared = memory()
        owner = first(shared)
        for second in makers:
            with pytest.raises(ValueError, match=MESSAGE):
                second(shared)
        first(memory())  # another one is free
        del owner
        assert first(shared) is not None  # and so is one whose owner is forgotten


def test_a_reducer_belongs_to_one_averager_or_state():
    transport = in_process.group(1)[0]
    params = [torch.nn.Parameter(torch.zeros(4))]
    state = SparseState.topk(0.5, transport=transport)
    with pytest.raises(ValueError, match="reducer belongs to another averager or state already"):
        LocalSGD(1, params=params, transport=transport, reducer=state.reducer)


def test_copies_have_a_memory_of_their_own():
    state = SparseState.topk(0.5, memory=ErrorFeedback(0.9))
    for other in (pickle.loads(pickle.dumps(state)), copy.deepcopy(state)):
        assert other.reducer.memory is not state.reducer.memory
        with pytest.raises(ValueError, match=MESSAGE):
            Reducer(TopK(0.5), AllGather(), other.reducer.memory)
        with pytest.raises(ValueError, match="reducer belongs to another averager or state already"):
            LocalSGD(1, params=[torch.nn.Parameter(torch.zeros(1))], reducer=other.reducer)
    with pytest.raises(ValueError, match="belongs to another"):
        copy.copy(state)
