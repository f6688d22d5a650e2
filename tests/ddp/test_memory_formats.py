"""A checkpoint of a channels_last model loads into a contiguous one, and the other way round."""

import torch
from launch import spawn_gloo
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from commhooks import ErrorFeedback, SparseState, register

SHAPE, STEPS = (4, 3, 5, 2), 4


class Given(nn.Module):
    """A weight whose gradient is the module's input."""

    def __init__(self, channels_last):
        super().__init__()
        weight = torch.zeros(SHAPE)
        self.weight = nn.Parameter(weight.to(memory_format=torch.channels_last) if channels_last else weight)

    def forward(self, gradient):
        return (self.weight * gradient).sum()


def gradient(rank, step):
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(SHAPE, generator=generator)


def train(rank, kinds):
    """One step for every kind of layout, each with the memory of the one before. The averages, by index."""
    saved, averages = None, []
    for step, channels_last in enumerate(kinds):
        model = DistributedDataParallel(Given(channels_last))
        memory = ErrorFeedback(momentum=0.5)
        state = SparseState.topk(0.1, memory=memory, dense_crossover=False, timeout_s=20.0)
        register(model, state)
        if saved is not None:
            state.load_state_dict(saved)
        model(gradient(rank, step)).backward()
        averages.append(model.module.weight.grad.reshape(-1).clone())
        assert model.module.weight.is_contiguous() != channels_last
        saved = state.state_dict()
        state.close()
    return averages, saved


def ranks(rank, size):
    expected, memory = train(rank, [False] * STEPS)
    for kinds in ([True, False, True, False], [True] * STEPS):
        averages, found = train(rank, kinds)
        assert all(torch.equal(a, b) for a, b in zip(averages, expected, strict=True))
        for kind in ("residual", "velocity"):
            assert torch.equal(found[kind]["weight"], memory[kind]["weight"])
    return bool(memory["residual"]["weight"].any())


def test_a_memory_goes_from_one_memory_format_to_the_other_and_back():
    assert all(spawn_gloo(ranks, 2, timeout=60))
