"""What is a step under Horovod: passes that do not count, and a GradScaler. Run on several ranks by test_jobs.py."""

import warnings

import horovod.torch as hvd
import pytest
import torch
from common import case
from torch import nn
from wrapping import stock

from commhooks import ErrorFeedback, SparseState
from commhooks.horovod import DistributedOptimizer

JUNK, REAL = torch.tensor([8.0, 4.0, 2.0, 1.0]), torch.tensor([1.0, 2.0, 3.0, 0.5])


class W(nn.Module):
    """Its gradient is its input."""

    def __init__(self, numel=4):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(numel))

    def forward(self, g):
        return (self.w * g).sum()


def made(density=0.25, **options):
    model = W()
    memory = ErrorFeedback(momentum=0.5)
    options = {"dense_crossover": False, "timeout_s": 20.0, "undoable": True, **options}
    state = SparseState.topk(density, memory=memory, **options)
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    return model, DistributedOptimizer(inner, model.named_parameters(), state=state)


def step(model, optimizer, g):
    optimizer.zero_grad()
    model(g).backward()
    optimizer.step()


def unwanted(how, model, optimizer):
    """A backward pass that is not to count, between two steps."""
    optimizer.zero_grad()
    if how == "passthrough":
        with optimizer.passthrough():
            model(JUNK).backward()
            assert torch.equal(model.w.grad, JUNK)  # this rank's own
    elif how == "discard":
        model(JUNK).backward()
        optimizer.discard()
    elif how == "discard after synchronize":
        model(JUNK).backward()
        optimizer.synchronize()
        optimizer.discard()


@case()
def a_pass_that_does_not_count_leaves_no_trace():
    found = []
    for how in ("nothing", "passthrough", "discard", "discard after synchronize"):
        model, optimizer = made()
        for g in (REAL, REAL.flip(0)):
            step(model, optimizer, g * (1 + hvd.rank()))
            unwanted(how, model, optimizer)
        step(model, optimizer, REAL)
        saved = optimizer.sparse_state.state_dict()
        found.append(
            (model.w.detach().clone(), saved["residual"]["w"], saved["velocity"]["w"], saved["step"])
        )
        optimizer.close()
    for other in found[1:]:
        assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(found[0], other)), (
            found
        )


def texts_of(work):
    """What ``work`` warned of averages that no optimizer used."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        work()
    return [str(w.message) for w in caught if "an optimizer" in str(w.message)]


@case()
def averages_that_are_zeroed_before_a_step_are_warned_of_once():
    remedies = {"ours": ("discard()", "undoable=True", "passthrough()", "Under Horovod")}
    remedies |= dict.fromkeys(("topk", "randomk"), ("requires_grad_(False)", "discard()", "elsewhere"))
    for kind, named in remedies.items():
        if kind == "ours":
            model, optimizer = made()
        else:
            model = W()
            optimizer = stock(kind, 0.5, fails=True)(model, torch.optim.SGD(model.parameters(), lr=1.0))

        def unused(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            model(JUNK).backward()
            optimizer.synchronize()

        def voted_out(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            model(JUNK * float("nan") if hvd.rank() == 0 else JUNK).backward()
            optimizer.synchronize()
            with optimizer.skip_synchronize():
                pass  # a GradScaler skips this step

        def frozen(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            model.requires_grad_(False)
            g = JUNK.clone().requires_grad_()
            model(g).backward()
            model.requires_grad_(True)

        def used(model=model, optimizer=optimizer):
            step(model, optimizer, REAL)

        before_any_step = texts_of(lambda: [unused(), unused()])
        harmless = texts_of(lambda: [used(), used(), voted_out(), used(), frozen(), used()])
        assert before_any_step == harmless == [], (kind, before_any_step, harmless)
        lost = texts_of(lambda: [unused(), used(), unused(), used()])
        assert len(lost) == 1 and all(remedy in lost[0] for remedy in named), (kind, lost)
        if kind == "ours":
            optimizer.close()


@case()
def reset_forgets_what_was_withheld():
    model, optimizer = made()
    step(model, optimizer, JUNK)
    optimizer.reset()
    before = model.w.detach().clone()
    step(model, optimizer, REAL)
    residual = optimizer.sparse_state.state_dict()["residual"]["w"]
    assert torch.equal(before - model.w.detach() + residual, REAL)
    optimizer.close()


class Two(nn.Module):
    """The second parameter is used by rank 0 only."""

    def __init__(self):
        super().__init__()
        self.w, self.z = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.full((4,), 2.0))

    def forward(self, g):
        return (self.w * g).sum() + ((self.z * g).sum() if hvd.rank() == 0 else 0.0)


@case()
def a_pass_onto_an_average_is_of_the_same_step():
    """Two exchanges before the step of the optimizer: the sum of the gradients counts, and the decay once."""
    for decay in (0.0, 0.25):
        model = Two()
        memory = ErrorFeedback(momentum=0.5, weight_decay=decay)
        state = SparseState.topk(0.25, memory=memory, dense_crossover=False, timeout_s=20.0)
        inner = torch.optim.SGD(model.parameters(), lr=1.0)
        optimizer = DistributedOptimizer(inner, model.named_parameters(), state=state)
        due = {"w": torch.zeros(4), "z": torch.zeros(4)}
        velocity = {name: torch.zeros(4) for name in due}
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        for _ in range(3):
            for name, p in model.named_parameters():
                reached = name == "w" or hvd.rank() == 0
                gradient = 2 * REAL * reached + decay * p.detach()
                if bool(gradient.any()):
                    velocity[name] = 0.5 * velocity[name] + gradient
                    due[name] += velocity[name]
            model(REAL).backward()
            optimizer.synchronize()
            model(REAL).backward()
            optimizer.synchronize()
            with optimizer.skip_synchronize():
                optimizer.step()
            optimizer.zero_grad()
        residual = state.state_dict()["residual"]
        for name, p in model.named_parameters():
            withheld = hvd.allreduce(residual[name].clone(), name=f"residual.{name}.{decay}")
            mean_due = hvd.allreduce(due[name], name=f"due.{name}.{decay}")
            torch.testing.assert_close(start[name] - p.detach() + withheld, mean_due)
        optimizer.close()


def scaled_step(model, optimizer, scaler, in_order):
    scaler.scale(model(torch.ones(4))).backward()
    if not in_order:
        scaler.step(optimizer)
        return
    optimizer.synchronize()
    scaler.unscale_(optimizer)
    with optimizer.skip_synchronize():
        scaler.step(optimizer)
    scaler.update()


@case()
def a_scalers_step_without_synchronize_is_an_error_that_tells_the_order():
    order = r"optimizer.synchronize\(\).*unscale_.*skip_synchronize"
    for make in (None, stock("topk", 1.0, fails=True), stock("randomk", 1.0, fails=True)):
        for in_order in (False, True):
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            if make is None:
                model, optimizer = made(1.0, grad_scaler=scaler)
            else:
                model = W()
                optimizer = make(model, torch.optim.SGD(model.parameters(), lr=1.0))
            if in_order:
                scaled_step(model, optimizer, scaler, in_order)
                assert torch.equal(model.w.detach(), -torch.ones(4))
            else:
                with pytest.raises(RuntimeError, match=order):
                    scaled_step(model, optimizer, scaler, in_order)
                assert not bool(model.w.any())
            if make is None:
                optimizer.gradient_sync.reset()
                optimizer.close()


@case()
def a_rank_with_inf_is_told_too():
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model, optimizer = made(1.0, grad_scaler=scaler)
    g = torch.full((4,), float("inf")) if hvd.rank() == 1 else torch.ones(4)
    scaler.scale(model(g)).backward()
    with pytest.raises(RuntimeError, match="skip_synchronize"):
        scaler.step(optimizer)
    optimizer.gradient_sync.reset()
    optimizer.close()
