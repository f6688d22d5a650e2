"""Saving, pickling and resuming under DDP: bit-exact with the same ranks, the mean kept with others."""

import copy
import gc
import io
import weakref

import pytest
import torch
import torch.distributed as dist
from ddp_cases import (
    Data,
    buckets_seen,
    check_step,
    loss_of,
    make_net,
    make_state,
    mean_over_ranks,
    memory_of,
    parameters_of,
    sgd_step,
    sparse_ddp,
    wrap,
)
from launch import spawn_gloo

from commhooks import ErrorFeedback, prime_layout, register

TIMEOUT = 120.0
RATE = 0.02


def train(ddp, data, steps):
    for step in steps:
        ddp.zero_grad()
        loss_of(ddp, data(step)).backward()
        sgd_step(ddp, None, RATE)


def saved(*things):
    buffer = io.BytesIO()
    torch.save(things, buffer)
    return buffer.getvalue()


def resume(rank, size, how, scheme):
    """4 steps, a checkpoint, 4 more; against the same 8 steps without interruption."""
    data = Data(rank)
    whole, whole_state = sparse_ddp(scheme, 0.05, ErrorFeedback(0.9))
    train(whole, data, range(8))
    first, state = sparse_ddp(scheme, 0.05, ErrorFeedback(0.9))
    train(first, data, range(4))
    weights = copy.deepcopy(first.module.state_dict())
    kept = state if how == "pickle" else state.state_dict()
    checkpoint = saved(weights, kept)
    residual = memory_of(first, state)
    state.close()

    weights, kept = torch.load(io.BytesIO(checkpoint), weights_only=how != "pickle")
    model = make_net(seed=99)
    if how == "no priming":
        model.load_state_dict(weights)
    second = wrap(model)
    state = register(second, kept if how == "pickle" else make_state(scheme, 0.05, ErrorFeedback(0.9)))
    seen = buckets_seen(state)
    if how != "no priming":
        before = torch.get_rng_state()
        prime_layout(second, state, lambda: loss_of(second, data(77)).backward())
        assert torch.equal(torch.get_rng_state(), before)
        assert all(p.grad is None for p in second.parameters())
        model.load_state_dict(weights)
    if how != "pickle":
        state.load_state_dict(kept)
    layouts = len(seen) - 1
    train(second, data, range(4, 8))
    same = torch.equal(parameters_of(second), parameters_of(whole))
    same &= torch.equal(memory_of(second, state), memory_of(whole, whole_state))
    same &= torch.equal(memory_of(second, state, "velocity"), memory_of(whole, whole_state, "velocity"))
    steps = state.stats()["step"]
    state.close()
    whole_state.close()
    return same, steps, bool(residual.any()), layouts, seen


@pytest.mark.parametrize("scheme", ["gtopk", "randomk"])
def test_a_primed_run_resumes_bit_for_bit(scheme):
    for same, steps, withheld, layouts, seen in spawn_gloo(
        resume, 2, args=("state_dict", scheme), timeout=TIMEOUT
    ):
        assert same and steps == 8 and withheld
        # Primed: the real steps have the second layout.
        assert layouts == 2 and seen[0] != seen[1] == seen[-2]


def test_a_pickled_state_resumes_bit_for_bit():
    for same, steps, withheld, _, _ in spawn_gloo(resume, 2, args=("pickle", "gtopk"), timeout=TIMEOUT):
        assert same and steps == 8 and withheld


def test_without_priming_the_first_layout_comes_back():
    """Why prime_layout exists; the residuals are all there, they are selected per other buckets for a step."""
    for same, steps, withheld, _, seen in spawn_gloo(
        resume, 2, args=("no priming", "gtopk"), timeout=TIMEOUT
    ):
        assert not same and steps == 8 and withheld and seen[0] != seen[1]


def continuity(rank, size):
    """What was loaded by name is what the next exchange starts from, whatever the layout."""
    data = Data(rank)
    ddp, state = sparse_ddp("gtopk", 0.05, ErrorFeedback(0.5))
    for step in range(3):
        sgd_step(ddp, check_step(ddp, state, [data(step)], beta=0.5), RATE)
    kept, weights = state.state_dict(), ddp.module.state_dict()
    assert set(kept["residual"]) == set(kept["velocity"]) == {n for n, _ in ddp.module.named_parameters()}
    state.close()
    model = make_net(seed=5)
    model.load_state_dict(weights)
    other = wrap(model, bucket_cap_mb=25)
    state = register(other, make_state("gtopk", 0.05, ErrorFeedback(0.5)))
    state.load_state_dict(kept)
    memory = torch.cat([kept["residual"][n] for n in sorted(kept["residual"])])
    assert torch.equal(memory_of(other, state), memory)
    prime_layout(
        other, state, lambda: loss_of(other, data(77)).backward()
    )  # touches no memory, sends nothing
    assert torch.equal(memory_of(other, state), memory)
    assert state.stats()["step"] == 3 and state.reducer.transport.counters.bytes_sent == 0
    for step in range(3, 6):
        sgd_step(other, check_step(other, state, [data(step)], beta=0.5), RATE)
    wrong_rank = {**kept, "rank": 1 - rank}
    with pytest.raises(ValueError, match="state is rank"):
        state.load_state_dict(wrong_rank)
    state.close()


def test_residuals_go_on_from_a_state_dict():
    spawn_gloo(continuity, 2, timeout=TIMEOUT)


def save_states(rank, size, folder):
    ddp, state = sparse_ddp("topk", 0.05, ErrorFeedback(0.5))
    train(ddp, Data(rank), range(4))
    torch.save((ddp.module.state_dict(), state.state_dict()), f"{folder}/rank{rank}.pt")
    mean = mean_over_ranks(memory_of(ddp, state)), mean_over_ranks(memory_of(ddp, state, "velocity"))
    state.close()
    return mean


def load_states(rank, size, folder, old_size):
    files = [torch.load(f"{folder}/rank{p}.pt", weights_only=True) for p in range(old_size)]
    model = make_net(seed=3)
    model.load_state_dict(files[0][0])
    ddp = wrap(model)
    state = register(ddp, make_state("topk", 0.05, ErrorFeedback(0.5)))
    with pytest.raises(ValueError, match=f"{old_size} ranks and this one has {size}"):
        state.load_state_dict(files[0][1])
    state.load_state_dict([f[1] for f in files])
    mean = mean_over_ranks(memory_of(ddp, state)), mean_over_ranks(memory_of(ddp, state, "velocity"))
    for step in range(4, 7):
        sgd_step(ddp, check_step(ddp, state, [Data(rank)(step)], beta=0.5), RATE)
    state.close()
    return mean


@pytest.mark.parametrize("old, new", [(3, 2), (2, 3)])
def test_another_number_of_ranks_keeps_the_mean_residual_and_trains_on(tmp_path, old, new):
    before = spawn_gloo(save_states, old, args=(str(tmp_path),), timeout=TIMEOUT)[0]
    for after in spawn_gloo(load_states, new, args=(str(tmp_path), old), timeout=TIMEOUT):
        for a, b in zip(after, before, strict=True):
            assert bool(b.any())
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def closing(rank, size):
    """close() twice, and a state that goes on after it with a new transport."""
    ddp, state = sparse_ddp("gtopk", 0.1)
    train(ddp, Data(rank), range(2))
    norm = state.stats()["residual_norm"]
    state.close()
    state.close()
    assert state.stats()["residual_norm"] == norm > 0
    dist.barrier()
    sgd_step(ddp, check_step(ddp, state, [Data(rank)(3)]))
    state.close()


def test_closing_keeps_the_memory():
    spawn_gloo(closing, 2, timeout=TIMEOUT)


def forgotten(rank, size, scheme):
    """A model and a state that nobody holds any more, after training."""
    ddp, state = sparse_ddp(scheme, 0.05, ErrorFeedback(0.9))
    train(ddp, Data(rank), range(3))
    state.close()
    held = weakref.ref(ddp.module), weakref.ref(state)
    del ddp, state
    gc.collect()
    return [thing() is None for thing in held]


@pytest.mark.parametrize("scheme", ["topk", "gtopk", "randomk", "dense"])
def test_a_forgotten_model_gives_its_memory_back(scheme):
    """DDP's C++ part holds the state; were the state to hold the model, neither would ever be freed."""
    assert all(all(freed) for freed in spawn_gloo(forgotten, 2, args=(scheme,), timeout=TIMEOUT))
