"""What commhooks.horovod.DistributedOptimizer saves, loads, broadcasts and restores. Run by test_jobs.py."""

# ruff: noqa: B023  (what is defined in a loop here is called in the same turn)

import horovod.torch as hvd
import torch
from common import (
    STEPS,
    Net,
    batch,
    case,
    close,
    flat,
    loss_of,
    reduced,
    same_everywhere,
    train,
)
from wrapping import SMALL_MB, ours

from commhooks import ErrorFeedback, ExponentialWarmup, GTopK, SparseState, TopK
from commhooks.horovod import DistributedOptimizer


@case()
def saved_and_loaded_is_as_if_never_stopped():
    for name in ("topk", "gtopk", "randomk", "lowbit"):

        def memory():
            return ErrorFeedback(momentum=0.9)

        whole, _ = train(ours(name, memory=memory()), lr=0.02)
        first, optimizer = train(ours(name, memory=memory()), steps=3, lr=0.02)
        saved = optimizer.state_dict()
        second = Net()
        second.load_state_dict(first.state_dict())
        again = ours(name, memory=memory())(second, torch.optim.SGD(second.parameters(), lr=1.0))
        again.load_state_dict(saved)
        for step in range(3, STEPS):
            again.zero_grad()
            loss_of(second, hvd.rank(), step).backward()
            again.step()
        assert torch.equal(flat(second), flat(whole)), name


@case()
def states_of_any_world_size_are_loaded():
    """As many: each rank's own. One more than there are now: their average is kept."""
    for name in ("topk", "gtopk", "randomk"):
        _, optimizer = train(ours(name, memory=ErrorFeedback(momentum=0.5)), lr=0.02)
        saved = optimizer.state_dict()
        everyone = hvd.allgather_object(saved["commhooks"], name="cases.states")
        optimizer.load_state_dict({**saved, "commhooks": everyone})
        back = optimizer.state_dict()["commhooks"]
        for kind in ("residual", "velocity"):
            assert all(torch.equal(back[kind][n], t) and t.any() for n, t in _used(saved["commhooks"][kind]))
        more = hvd.size() + 1
        extra = {
            kind: {n: t.flip(0) + 1.0 for n, t in everyone[0][kind].items()}
            for kind in ("residual", "velocity")
        }
        states = [{**s, "world_size": more} for s in (*everyone, {**everyone[0], **extra, "rank": more - 1})]
        model, optimizer = train(ours(name, memory=ErrorFeedback(momentum=0.5)), steps=0)
        optimizer.load_state_dict({**saved, "commhooks": states})
        loaded = optimizer.state_dict()["commhooks"]
        assert loaded["step"] == STEPS
        for kind in ("residual", "velocity"):
            for n, mine in loaded[kind].items():
                close(reduced(mine), sum(state[kind][n] for state in states) / more)
        loss_of(model, hvd.rank(), STEPS).backward()
        optimizer.step()
        assert same_everywhere(flat(model))


@case()
def a_memory_goes_from_one_memory_format_to_the_other():
    shape = (4, 3, 5, 2)

    def step(channels_last, number, saved):
        torch.manual_seed(number)
        weight = torch.zeros(shape)
        weight = torch.nn.Parameter(weight.to(memory_format=torch.channels_last) if channels_last else weight)
        model = torch.nn.ParameterDict({"w": weight})
        optimizer = ours("topk", memory=ErrorFeedback(0.5))(model, torch.optim.SGD([weight], lr=1.0))
        if saved is not None:
            optimizer.load_state_dict({**optimizer.state_dict(), "commhooks": saved})
        generator = torch.Generator().manual_seed(10 * number + hvd.rank())
        (weight * torch.randn(shape, generator=generator)).sum().backward()
        optimizer.step()
        saved = optimizer.state_dict()["commhooks"]
        optimizer.close()
        return weight.detach().reshape(-1).clone(), saved

    expected = mixed = None
    for number, channels_last in enumerate((True, False, True)):
        one, expected = step(False, number, expected)
        other, mixed = step(channels_last, number, mixed)
        assert torch.equal(one, other), number
        for kind in ("residual", "velocity"):
            assert torch.equal(mixed[kind]["w"], expected[kind]["w"]), (number, kind)
    assert expected["residual"]["w"].any()


def _used(tensors):
    return [(name, tensor) for name, tensor in tensors.items() if not name.startswith("idle")]


@case()
def broadcast_optimizer_state():
    model = Net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if hvd.rank() == 0:  # as after loading a checkpoint on rank 0 alone
        loss_of(model, 0, 0).backward()
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        sgd.step()
        sgd.zero_grad()
        for group in sgd.param_groups:
            group["lr"] = 0.025
    optimizer = ours("topk", 1.0)(model, sgd)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    assert optimizer.param_groups[0]["lr"] == 0.025
    assert same_everywhere(optimizer.state[model.out.weight]["momentum_buffer"])
    for step in range(2):
        optimizer.zero_grad()
        loss_of(model, hvd.rank(), step).backward()
        optimizer.step()
    assert same_everywhere(flat(model))


@case()
def elastic_state_commits_and_restores_residuals():
    for name in ("topk", "gtopk"):
        whole, _ = train(ours(name))
        model, optimizer = train(ours(name), steps=2)
        state = hvd.elastic.TorchState(model=model, optimizer=optimizer, epoch=0)
        state.sync()
        loss_of(model, hvd.rank(), 2).backward()
        optimizer.step()
        state.save()  # what commit() does, without the look for new hosts
        kept = {n: r.clone() for n, r in optimizer.state_dict()["commhooks"]["residual"].items()}
        for step in range(3, 5):  # thrown away below
            optimizer.zero_grad()
            loss_of(model, hvd.rank(), 50 + step).backward()
            optimizer.step()
        state.restore()
        back = optimizer.state_dict()["commhooks"]
        assert all(torch.equal(back["residual"][n], r) for n, r in kept.items()) and back["step"] == 3
        for step in range(3, STEPS):
            optimizer.zero_grad()
            loss_of(model, hvd.rank(), step).backward()
            optimizer.step()
        close(flat(model), flat(whole), 1e-6)


@case()
def schedulers_warmup_and_scaler():
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    model = Net()
    state = SparseState(
        TopK(ExponentialWarmup(0.05, warmup_steps=4)), GTopK(), grad_scaler=scaler, timeout_s=20.0
    )
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = DistributedOptimizer(sgd, model.named_parameters(), state=state, bucket_cap_mb=SMALL_MB)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    poison = {"factor": 1.0}
    model.out.weight.register_hook(lambda g: g * poison["factor"])
    for step in range(8):
        poison["factor"] = float("inf") if step == 3 and hvd.rank() == 0 else 1.0
        before = flat(model).clone()
        optimizer.zero_grad()
        scaler.scale(loss_of(model, hvd.rank(), step)).backward()
        optimizer.synchronize()
        scaler.unscale_(optimizer)
        with optimizer.skip_synchronize():
            scaler.step(optimizer)
        scaler.update()
        schedule.step()
        assert torch.equal(flat(model), before) == (step == 3)
        assert same_everywhere(flat(model))
    assert scaler.get_scale() == 512.0 and optimizer.sparse_state.stats()["nonfinite_steps"] == 1
    assert abs(optimizer.param_groups[0]["lr"] - 0.1 / 16) < 1e-12


@case()
def learning_rate_in_the_memory():
    model = Net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    memory = ErrorFeedback(rescale_with_lr=sgd)
    optimizer = ours("topk", memory=memory)(model, sgd)
    loss_of(model, hvd.rank(), 0).backward()
    optimizer.step()
    before = optimizer.state_dict()["commhooks"]["residual"]["out.weight"]
    for group in optimizer.param_groups:
        group["lr"] = 0.05
    optimizer.zero_grad()
    x, _ = batch(hvd.rank(), 1)
    (model.a(x).sum() * 1e-12).backward()
    optimizer.step()
    after = optimizer.state_dict()["commhooks"]["residual"]["out.weight"]
    kept = after != 0
    assert kept.any() and torch.allclose(after[kept], 2.0 * before[kept])
