"""A bucket's way through the rooms, followed call by call: few returns to rooms it has left."""

import sys

import pytest
import torch
from ranks import integers

from commhooks import AllGather, Bucket, ErrorFeedback, RandomK, Reducer, SharedIndices, TopK
from commhooks.transports import in_process

# The Reducer's own room calls all others, kernels are called from everywhere, and buckets and pairs are what travels.
NOT_COUNTED = ("reduction", "native", "gradient")
MOST_RETURNS = 3
SCHEMES = {  # every round of gTop-k packs, sends and unpacks a message again: its way grows with the ranks
    "topk": lambda t: (TopK(0.05), AllGather(t)),
    "randomk": lambda t: (RandomK(0.05), SharedIndices(t)),
}


def rooms_of_a_bucket(parts, world_size):
    """The rooms rank 0 enters while it reduces a bucket of a step that is not its first."""
    entered = []

    def note(frame, event, _):
        _, inside, path = frame.f_code.co_filename.partition("/commhooks/")
        room = path.split("/")[0]
        if event == "call" and inside and room not in NOT_COUNTED and entered[-1:] != [room]:
            entered.append(room)

    def work(transport):
        reducer = Reducer(*parts(transport), ErrorFeedback())
        generator = torch.Generator().manual_seed(transport.rank)
        for step in range(3):
            bucket = Bucket(0, integers(generator, 200), ("p",), (200,))
            if step == 2 and transport.rank == 0:
                sys.setprofile(note)
            reducer.reduce(bucket)
            sys.setprofile(None)

    in_process.run(world_size, work)
    return entered


@pytest.mark.parametrize("scheme", SCHEMES)
def test_few_returns(scheme):
    rooms = rooms_of_a_bucket(SCHEMES[scheme], 2)
    returns = [room for i, room in enumerate(rooms) if room in rooms[:i]]
    assert {"memory", "selection", "exchange", "transports"} <= set(rooms)
    assert len(returns) <= MOST_RETURNS, rooms
