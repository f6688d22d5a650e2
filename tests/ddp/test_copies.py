"""Saved, copied and newly wrapped DDP models have their hook and their memory."""

import copy
import io

import pytest
import torch
from ddp_cases import Data, loss_of, make_net, make_state, parameters_of, wrap
from launch import spawn_gloo
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from commhooks import ErrorFeedback, SparseState, register

RATE = 0.05


def step(model, batch):
    model.zero_grad()
    loss_of(model, batch).backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= RATE * p.grad


def from_file(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def state_in(ddp):
    """The state of a copied model's hook."""
    ((_, state),) = ddp._comm_hooks
    return state


def like_torchs_test(rank, size):
    """As torch's test_DistributedDataParallelCPU: a pickled model trains as the bare one on all data."""
    for how in ("sparse", "left to DDP"):
        bare, batches = make_net(), [Data(r) for r in range(size)]
        ddp = wrap(make_net())
        if how == "sparse":
            state = make_state("topk", 1.0)
        else:
            state = SparseState.dense(ddp_allreduce=True)
        register(ddp, state)
        ddp = from_file(ddp)
        for number in range(4):
            step(ddp, batches[rank](number))
            bare.zero_grad()
            sum(loss_of(bare, data(number)) / size for data in batches).backward()
            with torch.no_grad():
                for p in bare.parameters():
                    p -= RATE * p.grad
            for p, q in zip(bare.parameters(), ddp.module.parameters(), strict=True):
                torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-6)
        if how == "sparse":
            assert state_in(ddp).stats()["step"] == 4 and state_in(ddp) is not state
            state_in(ddp).close()
        else:
            assert ddp._comm_hooks == []
        state.close()


def copies(rank, size):
    """A copy in the middle of a run goes on as the original, with a memory of its own."""
    data = Data(rank)
    for make in (from_file, copy.deepcopy):
        whole = wrap(make_net(), bucket_cap_mb=25)
        state = register(whole, make_state("topk", 0.1, ErrorFeedback(0.5)))
        for number in range(3):
            step(whole, data(number))
        copied = make(whole)
        for number in (3, 4, 5):
            step(whole, data(number))
            step(copied, data(number))
            assert torch.equal(parameters_of(whole), parameters_of(copied)), (make, number)
        other = state_in(copied)
        assert other is not state and other.stats()["step"] == state.stats()["step"] == 6
        mine, theirs = state.state_dict(), other.state_dict()
        for name, residual in mine["residual"].items():
            assert torch.equal(theirs["residual"][name], residual) and residual.any()
        other.close()

        # A loaded model may get a state of one's own.
        third = make(whole)
        given = register(third, make_state("topk", 0.1, ErrorFeedback(0.5)))
        given.load_state_dict(mine)
        step(whole, data(6))
        step(third, data(6))
        assert torch.equal(parameters_of(whole), parameters_of(third)) and state_in(third) is given
        given.close()
        state.close()


def averages(rank, size):
    """A copy that holds an average of the weights is evaluated on one rank alone, and opens nothing."""
    data, ddp = Data(rank), wrap(make_net())
    state = register(ddp, make_state("topk", 0.1))
    ema = AveragedModel(ddp, multi_avg_fn=None)
    weights = []
    for number in range(3):
        step(ddp, data(number))
        ema.update_parameters(ddp)
        weights.append(parameters_of(ddp))
    held = parameters_of(ema.module)
    torch.testing.assert_close(held, torch.stack(weights).mean(0))
    if rank == 0:
        with torch.no_grad():
            ema.module.eval()(data(0)[0])
    assert not state_in(ema.module).reducer.connection.is_open
    state.close()


def scalers(rank, size):
    """A deep copy has the scaler; a pickled state asks for it before it mixes units."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    ddp = wrap(make_net())
    state = register(ddp, make_state("topk", 0.1, grad_scaler=scaler))
    step(ddp, Data(rank)(0))
    copied = copy.deepcopy(ddp)
    assert state_in(copied).grad_scaler is scaler
    loaded = from_file(ddp)
    with pytest.raises((RuntimeError, ValueError), match="set state.grad_scaler = scaler"):
        step(loaded, Data(rank)(1))
    loaded = from_file(ddp)
    state_in(loaded).grad_scaler = scaler
    step(loaded, Data(rank)(1))
    state_in(loaded).close()
    state.close()


class Halves(nn.Sequential):
    """Two layers, of which the first is frozen at first."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Linear(4, 4), nn.Linear(4, 1))
        self[0].requires_grad_(False)


def unfrozen(rank, size):
    """A model that is wrapped anew takes its state along, and the state keeps what it withheld."""
    for old_lives in (False, True):
        model, gradient = Halves(), torch.randn(6, 4, generator=torch.Generator().manual_seed(rank))
        ddp = DistributedDataParallel(model)
        state = register(ddp, make_state("topk", 0.3))
        ddp(gradient).sum().backward()
        before = state.state_dict()["residual"]
        model[0].requires_grad_(True)
        model.zero_grad()
        kept = ddp if old_lives else None
        ddp = DistributedDataParallel(model)
        register(ddp, state)
        with state.passthrough():
            ddp(gradient).sum().backward()
        model.zero_grad()
        assert all(torch.equal(state.state_dict()["residual"][n], r) for n, r in before.items())
        ddp(gradient).sum().backward()
        assert sorted(state.state_dict()["residual"]) == ["0.bias", "0.weight", "1.bias", "1.weight"]
        assert kept is None or kept.module is model
        other = DistributedDataParallel(Halves())
        with pytest.raises(ValueError, match="has a model already"):
            register(other, state)
        state.close()


@pytest.mark.parametrize("work", [like_torchs_test, copies, averages, scalers, unfrozen])
def test_a_copied_model_has_its_hook(work):
    spawn_gloo(work, 2, timeout=60)
