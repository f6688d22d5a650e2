"""AveragedOptimizer as an optimizer: what schedulers, scalers, hooks and checkpoints ask of one."""

import copy
import warnings

import pytest
import torch
from torch.optim import lr_scheduler as schedulers

from commhooks.averaging import AveragedOptimizer, BlockMomentum, LocalSGD
from commhooks.transports import in_process

from .workers import in_ranks


def wrapped(kind="sgd", transport=None, period=100):
    parameter = torch.nn.Parameter(torch.ones(1))
    inner = {
        "sgd": lambda: torch.optim.SGD([parameter], lr=0.1, momentum=0.9),
        "adam": lambda: torch.optim.AdamW([parameter], lr=0.1),
        "plain": lambda: torch.optim.SGD([parameter], lr=0.1),
        "lbfgs": lambda: torch.optim.LBFGS([parameter]),
    }[kind]()
    averager = LocalSGD(period, transport=transport or in_process.group(1)[0])
    return parameter, inner, AveragedOptimizer(inner, averager)


SCHEDULERS = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 2, gamma=0.1),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, total_iters=3),
    "LinearLR": lambda o: schedulers.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, total_iters=8),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, max_lr=0.5, total_steps=12),
    "CyclicLR": lambda o: schedulers.CyclicLR(
        o, 0.01, 0.1, step_size_up=3, cycle_momentum="momentum" in o.defaults
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.05, anneal_epochs=4),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o, 0.1), schedulers.ExponentialLR(o, 0.9)], milestones=[3]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.1), schedulers.ExponentialLR(o, 0.9)]
    ),
}


def all_of_torchs():
    found = {
        n
        for n, s in vars(schedulers).items()
        if isinstance(s, type) and issubclass(s, schedulers.LRScheduler)
    }
    return found - {"LRScheduler", "_LRScheduler", "ReduceLROnPlateau"}


@pytest.mark.parametrize("name", sorted(SCHEDULERS.keys() | all_of_torchs()))
@pytest.mark.parametrize("kind", ("sgd", "adam"))
def test_every_scheduler_of_torch_drives_it_as_it_drives_the_optimizer(name, kind):
    """Rates and momenta step by step, with a load_state_dict on the way: Accelerate's prepare does one."""

    def run(wraps):
        parameter, inner, optimizer = wrapped(kind)
        optimizer = optimizer if wraps else inner
        scheduler = SCHEDULERS[name](optimizer)
        seen = []
        for step in range(10):
            if step == 4:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            parameter.grad = torch.ones(1)
            optimizer.step()
            scheduler.step()
            group = inner.param_groups[0]
            seen.append((group["lr"], group.get("momentum"), group.get("betas"), parameter.item()))
        return seen

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*epoch parameter.*")  # SequentialLR's own
        assert run(True) == run(False)


def test_reduce_on_plateau():
    parameter, inner, optimizer = wrapped()
    scheduler = schedulers.ReduceLROnPlateau(optimizer, patience=0)
    optimizer.load_state_dict(optimizer.state_dict())
    for _ in range(3):
        scheduler.step(1.0)
    assert inner.param_groups[0]["lr"] < 0.1


def test_groups_stay_the_optimizers_own_after_a_load():
    """0.89: one step at 0.1, one at 0.01; and a group added later is stepped and averaged."""
    parameter, inner, optimizer = wrapped("plain")
    scheduler = schedulers.StepLR(optimizer, 1, gamma=0.1)
    optimizer.load_state_dict(optimizer.state_dict())
    for _ in range(2):
        parameter.grad = torch.ones(1)
        optimizer.step()
        scheduler.step()
    assert parameter.item() == pytest.approx(0.89)
    assert optimizer.param_groups is inner.param_groups and optimizer.state is inner.state

    def work(transport):
        parameter, inner, optimizer = wrapped("plain", transport, period=1)
        optimizer.load_state_dict(optimizer.state_dict())
        added = torch.nn.Parameter(torch.full((1,), float(transport.rank)))
        optimizer.add_param_group({"params": [added]})
        added.grad = torch.ones(1)
        optimizer.step()
        return added.detach()

    torch.testing.assert_close(in_ranks(2, work), torch.full((1, 2), 0.4))


def test_closures():
    parameter, inner, optimizer = wrapped("plain")

    def closure():
        optimizer.zero_grad()
        loss = (2 * parameter).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2.0 and parameter.item() == pytest.approx(0.8)
    assert optimizer.step(closure=closure).item() == pytest.approx(1.6)
    assert optimizer.step() is None and optimizer.step(None) is None and optimizer.averager.step == 4
    parameter, inner, optimizer = wrapped("lbfgs")

    def square():
        optimizer.zero_grad()
        loss = (parameter - 3).square().sum()
        loss.backward()
        return loss

    optimizer.step(square)
    assert parameter.item() == pytest.approx(3.0, abs=1e-3)
    with pytest.raises(TypeError, match="closure"):
        optimizer.step()


def test_hooks_on_steps_see_the_wrapper_around_step_and_averaging():
    parameter, inner, optimizer = wrapped("plain", period=1)
    seen = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(("before", o, o.averager.step)))
    handle = optimizer.register_step_post_hook(
        lambda o, args, kwargs: seen.append(("after", o, o.averager.synchronisations))
    )
    parameter.grad = torch.ones(1)
    optimizer.step()
    assert [(a, c) for a, _, c in seen] == [("before", 0), ("after", 1)]
    assert all(o is optimizer for _, o, _ in seen)
    handle.remove()
    optimizer.step()
    assert len(seen) == 3


def test_hooks_on_state_dicts():
    parameter, inner, optimizer = wrapped()
    seen = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("pre"))
    optimizer.register_state_dict_post_hook(lambda o, state: seen.append("post"))
    optimizer.register_load_state_dict_pre_hook(lambda o, state: seen.append("load pre"))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("load post"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["pre", "post", "load pre", "load post"]


@pytest.mark.parametrize("kind", ("sgd", "adam"))
def test_deepcopy_is_an_optimizer_of_its_own(kind):
    """With the parameters copied too: the copy steps and averages the copies."""
    model = torch.nn.Linear(2, 1)
    inner = (
        torch.optim.AdamW(model.parameters())
        if kind == "adam"
        else torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    )
    averager = BlockMomentum(0.5, 2, params=model.parameters(), transport=in_process.group(1)[0])
    optimizer = AveragedOptimizer(inner, averager)

    def step(model, optimizer):
        optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    for _ in range(3):
        step(model, optimizer)
    other_model, other = copy.deepcopy((model, optimizer))
    before = [p.detach().clone() for p in model.parameters()]
    first = [step(other_model, other) for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert averager.step == 3 and other.averager.step == 6
    second = [step(model, optimizer) for _ in range(3)]
    assert all(
        torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True)
    )


def test_the_rest_of_an_optimizers_face():
    parameter, inner, optimizer = wrapped()
    assert isinstance(optimizer, torch.optim.Optimizer) and optimizer.defaults is inner.defaults
    assert "SGD" in repr(optimizer) and "LocalSGD" in repr(optimizer)
    parameter.grad = torch.ones(1)
    optimizer.zero_grad(set_to_none=False)
    assert parameter.grad.item() == 0.0
    optimizer.zero_grad()
    assert parameter.grad is None
    state = optimizer.state_dict()
    assert state.keys() == {"state", "param_groups", "step", "averager"}
    again = copy.deepcopy(state)
    optimizer.load_state_dict(state)
    assert optimizer.state_dict()["param_groups"] == again["param_groups"]
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict({**state, "param_groups": []})


@pytest.mark.parametrize("with_none", (False, True))
def test_a_scaler_steps_it(with_none):
    parameter, inner, optimizer = wrapped("plain")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(parameter.sum()).backward()
    scaler.step(optimizer, *([None] if with_none else []))
    scaler.update()
    assert parameter.item() == pytest.approx(0.9) and optimizer.averager.step == 1


# -- the hook on a bare optimizer ---------------------------------------------------------------------------


def test_a_hooked_optimizer_averages_by_itself():
    def work(transport):
        parameter = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        averager = LocalSGD(2, transport=transport)

        def step():
            parameter.grad = torch.full((1,), -float(transport.rank))
            optimizer.step()
            return parameter.item()

        with averager.hook(optimizer):
            inside = [step() for _ in range(4)]
            with pytest.raises(RuntimeError, match="hooked"):
                averager.average_parameters([parameter])
            with pytest.raises(RuntimeError, match="hooked"):
                averager.hook(optimizer)
        outside = [step() for _ in range(2)]
        averager.average_parameters([parameter])
        return inside, outside, averager.step

    first, second = in_process.run(2, work)
    assert first == ([0.0, 1.0, 1.0, 2.0], [2.0, 2.0], 5)
    assert second == ([1.0, 1.0, 2.0, 2.0], [3.0, 4.0], 5)
