"""``SparseState.for_optimizer``: what it moves, refuses, tells, and notices at later steps. One process."""

import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import lr_scheduler

from commhooks import ErrorFeedback, SparseState, register
from commhooks.transports import announce


@pytest.fixture(autouse=True)
def group(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def by_group(net, decays=(5e-4, 0.0), **options):
    weights = [p for p in net.parameters() if p.dim() > 1]
    biases = [p for p in net.parameters() if p.dim() == 1]
    groups = [{"params": weights, "weight_decay": decays[0]}, {"params": biases, "weight_decay": decays[1]}]
    return torch.optim.SGD(groups, lr=0.1, **options)


def step(ddp, optimizer, seed=0):
    optimizer.zero_grad()
    ddp(torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
    optimizer.step()


def trained(optimizer_of, make_state, steps=6):
    ddp = DistributedDataParallel(model())
    optimizer = optimizer_of(ddp.module)
    state = make_state(optimizer)
    if state is not None:
        register(ddp, state, optimizer)
    for number in range(steps):
        step(ddp, optimizer, number)
    if state is not None:
        state.close()
    return torch.cat([p.detach().flatten() for p in ddp.parameters()]), optimizer, state


@pytest.mark.parametrize("nesterov", (False, True))
def test_at_density_one_the_training_is_the_one_of_the_optimizer_alone(nesterov):
    """With a decay of each group. Everything is sent, so nothing is masked."""

    def optimizer_of(net):
        return by_group(net, (0.3, 0.1), momentum=0.9, nesterov=nesterov)

    def make_state(optimizer):
        return SparseState.for_optimizer(optimizer, 1.0, warmup_steps=0, dense_crossover=False)

    expected, _, _ = trained(optimizer_of, lambda optimizer: None)
    found, optimizer, state = trained(optimizer_of, make_state)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert all(not group[name] for group in optimizer.param_groups for name in ("momentum", "weight_decay"))
    assert state.moved == {"momentum": 0.9, "nesterov": nesterov, "weight_decay": "0.1 for 2, 0.3 for 2"}
    assert state.state_dict()["moved"] == state.moved
    assert pickle.loads(pickle.dumps(state)).moved == state.moved


@pytest.mark.parametrize("masking", (False, True))
def test_it_warms_up_clips_and_masks_as_told(masking, capsys):
    optimizer = torch.optim.SGD(model().parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    state = SparseState.for_optimizer(
        optimizer, 0.001, warmup_steps=40, scheme="gtopk", clip_norm=2.0, factor_masking=masking
    )
    assert f"; factor masking {'on' if masking else 'off'};" in capsys.readouterr().err
    memory = state.reducer.memory
    expected = ErrorFeedback(0.9, weight_decay=1e-4, factor_masking=masking, clip_norm=2.0)
    assert memory.settings() == expected.settings()
    schedule = state.reducer.selector.schedule if hasattr(state.reducer.selector, "schedule") else None
    shown = repr(state.reducer.selector)
    assert schedule is None or schedule.density(40) == 0.001
    assert "0.25->0.001 over 40x1" in shown
    plain = SparseState.for_optimizer(torch.optim.SGD(model().parameters(), lr=0.1), 0.3, warmup_steps=40)
    assert "units of the parameters" not in capsys.readouterr().err
    rescaled = SparseState.for_optimizer(optimizer, warmup_steps=0, rescale_with_lr=True)
    assert rescaled.reducer.memory.optimizer is optimizer
    assert "; the residual in units of the parameters\n" in capsys.readouterr().err
    assert not plain.reducer.memory.factor_masking and plain.reducer.memory.momentum == 0.0
    assert "0.3" in repr(plain.reducer.selector)


@pytest.mark.parametrize(
    ("warmup_steps", "density", "masks"), [(0, 0.01, True), (40, 0.01, False), (40, 0.3, True)]
)
def test_the_velocity_is_masked_where_no_warm_up_sends_most_of_it(warmup_steps, density, masks, capsys):
    optimizer = torch.optim.SGD(model().parameters(), lr=0.1, momentum=0.9)
    state = SparseState.for_optimizer(optimizer, density, warmup_steps=warmup_steps)
    assert state.reducer.memory.factor_masking == masks
    assert f"; factor masking {'on' if masks else 'off'};" in capsys.readouterr().err


@pytest.mark.parametrize(
    "scheduler",
    (
        lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
        lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1),
    ),
)
def test_a_scheduler_that_cycles_the_momentum_is_an_error_at_the_next_step(scheduler):
    ddp = DistributedDataParallel(model())
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
    state = register(ddp, SparseState.for_optimizer(optimizer, 0.5, warmup_steps=0), optimizer)
    step(ddp, optimizer)
    before = [p.detach().clone() for p in ddp.parameters()]
    scheduler(optimizer)
    with pytest.raises(ValueError, match=r"momentum=0\.\d+ again in parameter group 0.*cycle_momentum=False"):
        step(ddp, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, ddp.parameters(), strict=True))
    state.close()


def test_settings_that_come_back_by_hand_by_a_checkpoint_or_on_another_optimizer_are_errors():
    net = model()
    dense = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9).state_dict()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    state = SparseState.for_optimizer(optimizer, warmup_steps=0)
    optimizer.step()
    optimizer.param_groups[0]["weight_decay"] = 0.1
    with pytest.raises(ValueError, match=r"SGD has weight_decay=0\.1 again in parameter group 0"):
        optimizer.step()
    optimizer.param_groups[0]["weight_decay"] = 0.0
    optimizer.step()
    optimizer.load_state_dict(dense)
    with pytest.raises(ValueError, match=r"momentum=0\.9 again.*checkpoint of a run without the memory"):
        optimizer.step()
    other = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.5)  # as Horovod wraps: another object
    with pytest.raises(ValueError, match=r"momentum=0\.5 again"):
        other.step()
    torch.optim.SGD(model().parameters(), lr=0.1, momentum=0.5).step()  # of another model
    del state
    other.step()  # nobody has the momentum any more


def test_a_saved_state_of_other_settings_is_refused():
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    saved = SparseState.for_optimizer(optimizer, warmup_steps=0).state_dict()
    late = SparseState.for_optimizer(optimizer, warmup_steps=0)  # the optimizer says 0 by now
    with pytest.raises(ValueError, match=r"momentum 0\.9 there and 0\.0 here.*before the optimizer loads it"):
        late.load_state_dict(saved)
    again = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    SparseState.for_optimizer(again, warmup_steps=0).load_state_dict(saved)
    by_hand = SparseState.topk(0.01, memory=ErrorFeedback(0.9))
    by_hand.load_state_dict(saved)
    SparseState.for_optimizer(again, warmup_steps=0).load_state_dict(by_hand.state_dict())


def test_second_moments_stay_and_the_line_names_averaging(capsys):
    optimizer = torch.optim.AdamW(model().parameters(), lr=0.1, weight_decay=0.1)
    state = SparseState.for_optimizer(optimizer, warmup_steps=5, clip_norm=1.0)
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "commhooks.averaging.DiLoCo" in line
    assert "lowbit, every element in 4 bits: no density and no warm-up; clip_norm 1 over the bucket" in line
    assert repr(state.reducer.aggregator) == repr(SparseState.lowbit(4).reducer.aggregator)
    sparse = SparseState.for_optimizer(optimizer, 0.05, warmup_steps=5, scheme="topk")
    assert "0.25->0.05 over 5x1" in repr(sparse.reducer.selector)
    line = capsys.readouterr().err
    assert "topk, density" in line and "loses less of every element in 4 bits" in line
    assert state.reducer.memory.momentum == 0.0 and not state.reducer.memory.decays
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    optimizer.step()


def test_all_optimizers_but_sgd_send_every_element(capsys):
    matrix = torch.nn.Linear(4, 3, bias=False)
    for optimizer in (torch.optim.Muon(matrix.parameters()), torch.optim.ASGD(matrix.parameters())):
        state = SparseState.for_optimizer(optimizer)
        assert repr(state.reducer.aggregator) == repr(SparseState.lowbit(4).reducer.aggregator)
        assert "stays as it is; lowbit, every element in 4 bits" in capsys.readouterr().err
    state = SparseState.for_optimizer(torch.optim.SGD(matrix.parameters(), lr=0.1), warmup_steps=0)
    assert "TopK" in repr(state.reducer.selector)


def test_it_tells_what_it_did_on_rank_0_once(capsys, monkeypatch, caplog):
    def make():
        optimizer = by_group(model(), momentum=0.9)
        return SparseState.for_optimizer(optimizer, warmup_steps=7)

    make()
    assert capsys.readouterr().err == (
        "commhooks: momentum=0.9, weight_decay=0 for 2, 0.0005 for 2 moved from SGD into the memory; factor "
        "masking off; topk, density 0.25->0.01 over 7x1\n"
    )
    with caplog.at_level("INFO", logger="commhooks.ddp.recipe"):
        make()
    assert "moved from SGD" in caplog.text and not capsys.readouterr().err
    monkeypatch.setattr("commhooks.ddp.recipe.is_first_rank", lambda: False)
    make()
    assert not capsys.readouterr().err


def test_the_first_rank_is_known_without_a_group(monkeypatch):
    assert announce.is_first_rank()
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not announce.is_first_rank()
    monkeypatch.setenv("RANK", "0")
    assert announce.is_first_rank()


REFUSED = (
    ({}, {"scheme": "dense"}, "scheme must be one of topk"),
    ({}, {"scheme": "top"}, "got 'top'"),
    ({}, {"warmup_steps": -1}, "warmup_steps must be an integer >= 0, got -1"),
    ({}, {"density": 0.0}, "density must be in"),
    ({}, {"clip_norm": -1.0}, "clip_norm must be positive, got -1.0"),
    ({"momentum": 0.9, "dampening": 0.1}, {}, "dampening 0.1 has no counterpart"),
    ({"weight_decay": 0.1, "maximize": True}, {}, "maximize=True with weight_decay"),
    ({"momentum": 0.9}, {"scheme": "randomk"}, "scheme='randomk' diverges with momentum, here 0.9"),
    ({"momentum": 0.9}, {"timeout_s": -1}, "timeout_s must be positive"),
)


@pytest.mark.parametrize(("settings", "given", "message"), REFUSED)
def test_refusals_leave_the_optimizer_as_it_was(settings, given, message):
    optimizer = torch.optim.SGD(model().parameters(), lr=0.1, **settings)
    before = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    with pytest.raises(ValueError, match=message):
        SparseState.for_optimizer(optimizer, **{"warmup_steps": 3, **given})
    assert before == [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.step()


def test_refusals_of_kinds_and_groups():
    first, second = model(), model()
    groups = [
        {"params": first.parameters(), "momentum": 0.9},
        {"params": second.parameters(), "momentum": 0.5},
    ]
    with pytest.raises(ValueError, match=r"momentum differs between the parameter groups \(0\.9, 0\.5\)"):
        SparseState.for_optimizer(torch.optim.SGD(groups, lr=0.1), warmup_steps=0)
    with pytest.raises(TypeError, match="optimizer must be a torch optimizer, got float"):
        SparseState.for_optimizer(0.01, warmup_steps=0)
    optimizer = torch.optim.SGD(first.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="makes the memory"):
        SparseState.for_optimizer(optimizer, warmup_steps=0, memory=ErrorFeedback())
    with pytest.raises(TypeError, match="needs warmup_steps with scheme 'topk': .* a quarter of the run's"):
        SparseState.for_optimizer(optimizer)
    with pytest.raises(TypeError, match="needs warmup_steps with scheme 'gtopk'"):
        SparseState.for_optimizer(torch.optim.AdamW(first.parameters()), scheme="gtopk")


def test_a_parameter_that_joins_a_run_with_a_decay_of_each_group_is_named():
    ddp = DistributedDataParallel(model())
    optimizer = by_group(ddp.module, momentum=0.9)
    state = SparseState.for_optimizer(optimizer, 0.5, warmup_steps=0)
    for parameter in list(state.reducer.memory.weight_decay)[:1]:
        del state.reducer.memory.weight_decay[parameter]
    register(ddp, state, optimizer)
    with pytest.raises(RuntimeError, match=r"weight_decay: 0\.weight is not among its parameters"):
        step(ddp, optimizer)
    state.close()
