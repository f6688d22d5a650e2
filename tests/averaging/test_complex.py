"""Complex parameters are averaged as their two parts, everywhere."""

import pytest
import torch

from commhooks.averaging import LocalSGD, Stagewise, average_checkpoints
from commhooks.transports import in_process

from .test_membership import COMPRESSED, KINDS, make


@pytest.mark.parametrize("kind", KINDS + COMPRESSED)
@pytest.mark.parametrize("dtype", (torch.complex64, torch.complex128))
def test_every_averager(kind, dtype):
    """A step of 1 on rank 0 and of 1 + 2j on rank 1, from 1 + 1j."""

    def work(transport):
        params = [
            torch.nn.Parameter(torch.full((2,), 1 + 1j, dtype=dtype)),
            torch.nn.Parameter(torch.zeros(1)),
        ]
        optimizer = torch.optim.SGD(params, lr=1.0, momentum=0.5)
        averager = make(kind, params, transport, 1, optimizer)
        params[0].grad = torch.full_like(params[0], -(1 + 2j * transport.rank))
        params[1].grad = torch.zeros(1)
        optimizer.step()
        averager.average_parameters(params)
        return params[0].tolist()

    assert in_process.run(2, work) == [[2 + 2j, 2 + 2j]] * 2


def test_the_consensus_distance():
    def work(transport):
        parameter = torch.nn.Parameter(torch.tensor([1 + 1j * transport.rank]))
        return LocalSGD(9, transport=transport).consensus_distance([parameter])

    assert in_process.run(2, work) == [0.5, 0.5]


def test_checkpoints():
    first, second = ({"model": {"w": torch.tensor([value])}} for value in (1 + 2j, 3 + 4j))
    assert average_checkpoints([first, second])["model"]["w"].tolist() == [2 + 3j]


def test_stages():
    parameter = torch.nn.Parameter(torch.tensor([1 + 2j]))
    stages = Stagewise(torch.optim.SGD([parameter], lr=0.1), gamma=0.25, eta0=3.0)
    with torch.no_grad():
        parameter.add_(3 + 4j)
    assert stages.penalty().item() == 0.0  # loaded after it was made: the start
    stages.step()
    assert stages.stage == 1 and parameter.item() == 4 + 6j
    stages.penalty()
    with torch.no_grad():
        parameter.add_(3 + 4j)
    assert stages.penalty().item() == pytest.approx(25 / 0.5)
