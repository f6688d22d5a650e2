"""NaN and Inf under DDP: with and without GradScaler, all three policies, mass conserved over the next 20 steps."""

import logging

import pytest
import torch
from ddp_cases import (
    Data,
    by_name,
    check_step,
    corrected_now,
    local_gradients,
    loss_of,
    make_net,
    mean_over_ranks,
    memory_of,
    parameter_buckets,
    parameters_of,
    same_on_all_ranks,
    sgd_step,
    sparse_ddp,
)
from launch import spawn_gloo

from commhooks import ErrorFeedback, NonFiniteGradientError, SparseState

TIMEOUT = 150.0
RATE, BAD_STEP, STEPS = 0.02, 3, 24


def poison(ddp, rank):
    """Returns a switch; while it is on, rank 1's gradient of the last bucket holds an Inf."""
    switch = [False]

    def hook(g):
        if switch[0] and rank == 1:
            g = g.clone()
            g[0, 0] = float("inf")
        return g

    ddp.module.first.weight.register_hook(hook)
    return switch


def mask_of(ddp, names):
    """Bool (n,), in the order of all names: the elements of these parameters."""
    return torch.cat([torch.full((p.numel(),), n in names) for n, p in sorted(ddp.module.named_parameters())])


def close(left, right, size):
    """Equal to 2e-6 of the largest term."""
    assert float((left - right).abs().max()) <= 2e-6 * float(size.abs().max()), float(
        (left - right).abs().max()
    )


def with_scaler(rank, size, scheme, tell):
    """Returns the scales. ``tell``: the state gets the scaler, and its memory is in unscaled units."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=8)
    ddp, state = sparse_ddp(scheme, 0.05, ErrorFeedback(0.9), grad_scaler=scaler if tell else None)
    layout, switch = parameter_buckets(state, ddp), poison(ddp, rank)
    optimizer, data, scales, moved = torch.optim.SGD(ddp.parameters(), lr=RATE), Data(rank), [], []
    for step in range(STEPS):
        scale = scaler.get_scale()
        unit = 1.0 if tell else scale  # the memory's units
        scales.append(scale)
        switch[0] = step == BAD_STEP
        w, u, v = parameters_of(ddp), memory_of(ddp, state), memory_of(ddp, state, "velocity")
        gradients = {n: g * unit for n, g in local_gradients(ddp, data(step)).items()}
        corrected, velocity = corrected_now(ddp, state, gradients, beta=0.9)
        optimizer.zero_grad()
        scaler.scale(loss_of(ddp, data(step))).backward()
        scaler.step(optimizer)
        scaler.update()
        new_u, new_v = memory_of(ddp, state), memory_of(ddp, state, "velocity")
        assert new_u.isfinite().all() and new_v.isfinite().all()
        applied = (w - parameters_of(ddp)).double() / RATE  # by the optimizer, unscaled
        moved.append(bool(applied.any()))
        good = torch.ones_like(u, dtype=torch.bool)
        if step == BAD_STEP:
            assert len(layout[-2]) == 4 and "first.weight" in layout[-2][3]
            good = ~mask_of(ddp, layout[-2][3])
            torch.testing.assert_close(new_u[~good], u[~good], rtol=1e-5, atol=1e-6 * unit)
            torch.testing.assert_close(new_v[~good], v[~good], rtol=1e-5, atol=1e-6 * unit)
            assert not applied.any()
        torch.testing.assert_close(new_v[good], velocity[good], rtol=1e-5, atol=1e-6 * unit)
        have = mean_over_ranks(new_u) + applied * (unit if not tell else 1.0)
        expected = mean_over_ranks(corrected)
        # w - rate * update is rounded at the size of w.
        limit = 2e-6 * float(expected.abs().max()) + 3e-7 * unit * float(w.abs().max()) / RATE
        assert float((have - expected)[good].abs().max()) <= limit, step
        assert same_on_all_ranks(parameters_of(ddp))
    count = state.stats()["nonfinite_steps"]
    state.close()
    return scales, moved, count


@pytest.mark.parametrize(
    "scheme, size, tell",
    [("gtopk", 3, True), ("topk", 2, True), ("randomk", 2, True), ("dense", 2, True), ("gtopk", 2, False)],
)
def test_inf_in_the_last_of_four_buckets_under_grad_scaler(scheme, size, tell):
    for scales, moved, count in spawn_gloo(with_scaler, size, args=(scheme, tell), timeout=TIMEOUT):
        assert scales[BAD_STEP] == 1024.0 and scales[BAD_STEP + 1] == 512.0  # lowered as under plain DDP
        assert scales[-1] >= 1024.0  # and it grew again
        assert moved == [step != BAD_STEP for step in range(STEPS)] and count == 1


def policies(rank, size, nonfinite):
    logging.disable(logging.CRITICAL)
    ddp, state = sparse_ddp("gtopk", 0.05, ErrorFeedback(0.5), nonfinite=nonfinite)
    layout, switch, data = parameter_buckets(state, ddp), poison(ddp, rank), Data(rank)
    for step in range(BAD_STEP):
        sgd_step(ddp, check_step(ddp, state, [data(step)], beta=0.5), RATE)
    u = memory_of(ddp, state)
    corrected, _ = corrected_now(ddp, state, local_gradients(ddp, data(BAD_STEP)), beta=0.5)
    switch[0] = True
    ddp.zero_grad()
    if nonfinite == "error":
        with pytest.raises(RuntimeError, match="NonFiniteGradientError.*bucket 3"):
            loss_of(ddp, data(BAD_STEP)).backward()
        with pytest.raises(NonFiniteGradientError, match=f"rank {rank}, step {BAD_STEP}, bucket 3"):
            loss_of(ddp, data(BAD_STEP))
        assert isinstance(state.error, NonFiniteGradientError)
        assert memory_of(ddp, state).isfinite().all()
        return True
    loss_of(ddp, data(BAD_STEP)).backward()
    switch[0] = False
    bad = mask_of(ddp, layout[-2][3])
    update = by_name({n: p.grad for n, p in ddp.module.named_parameters()})
    assert len(layout[-2]) == 4 and update[~bad].isfinite().all() and update[~bad].any()
    assert bool(update[bad].isnan().all()) if nonfinite == "propagate" else not bool(update[bad].any())
    torch.testing.assert_close(memory_of(ddp, state)[bad], u[bad], rtol=1e-5, atol=1e-6)
    have, expected = mean_over_ranks(memory_of(ddp, state)), mean_over_ranks(corrected)
    if nonfinite == "skip":  # the other buckets' update stands
        have = have + update.double()
        sgd_step(ddp, None, RATE)
    close(have[~bad], expected[~bad], expected)  # else all of it is back in memory, and nobody steps
    for step in range(BAD_STEP + 1, STEPS):
        sgd_step(ddp, check_step(ddp, state, [data(step)], beta=0.5), RATE)
    count = state.stats()["nonfinite_steps"]
    state.close()
    return count == 1 and bool(parameters_of(ddp).isfinite().all())


@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "error"])
def test_policies_without_a_scaler(nonfinite):
    assert spawn_gloo(policies, 2, args=(nonfinite,), timeout=TIMEOUT) == [True] * 2


def half_overflow(rank, size):
    """float16 and a scale so large that gradients overflow on their own: the scaler finds one that fits."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=1000)
    ddp, state = sparse_ddp("topk", 0.1, model=make_net(dtype=torch.float16), grad_scaler=scaler)
    optimizer, data = torch.optim.SGD(ddp.parameters(), lr=RATE), Data(rank, torch.float16)
    skipped = 0
    for step in range(20):
        before = scaler.get_scale()
        optimizer.zero_grad()
        scaler.scale(loss_of(ddp, data(step))).backward()
        for p in ddp.parameters():  # unscale_ refuses float16 gradients
            p.grad = p.grad.float().to(torch.float16)
        bad = any(not bool(p.grad.isfinite().all()) for p in ddp.parameters())
        skipped += bad
        scaler.update(before / 2 if bad else before)
        assert memory_of(ddp, state).isfinite().all()
        if not bad:
            u = memory_of(ddp, state)
            assert float(u.abs().max()) < 100.0  # unscaled units
    state.close()
    return skipped, scaler.get_scale()


def test_overflowing_half_precision_gradients_never_enter_a_residual():
    (skipped, scale), other = spawn_gloo(half_overflow, 2, timeout=TIMEOUT)
    assert (skipped, scale) == other and 0 < skipped < 20


def test_skip_beside_a_scaler_is_refused():
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ValueError, match="'skip'.*'propagate'"):
        SparseState.topk(0.1, nonfinite="skip", grad_scaler=scaler)
    SparseState.topk(0.1, nonfinite="skip", grad_scaler=torch.amp.GradScaler("cpu", enabled=False))
