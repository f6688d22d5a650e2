"""DDP's modes: unused parameters, no_sync, static graph, bucket views, half precision, several models and groups."""

import warnings

import pytest
import torch
import torch.distributed as dist
from ddp_cases import (
    Data,
    buckets_seen,
    by_name,
    check_step,
    local_gradients,
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
from torch import nn

from commhooks import (
    AllGather,
    ErrorFeedback,
    SettingsMismatchError,
    SparseState,
    TopK,
    register,
    sparse_hook,
)
from commhooks.transports import in_process

TIMEOUT = 120.0


def unused_parameters(rank, size):
    for scheme in ("topk", "gtopk", "randomk", "dense"):
        ddp, state = sparse_ddp(
            scheme,
            0.1,
            ErrorFeedback(0.5),
            make_net(extra=True),
            {"find_unused_parameters": True},
        )
        data, extra, waited = Data(rank), "extra.weight", False
        for step in range(8):
            everyone, someone = step % 4 == 0, step % 4 in (1, 2)
            use = everyone or (someone and rank == step % size)
            before = memory_of(ddp, state)
            residual = state.state_dict()["residual"].get(extra)
            update = check_step(ddp, state, [data(step)], beta=0.5, options={"use_extra": use})
            now = state.state_dict()["residual"][extra]
            if not use and residual is not None:
                assert torch.equal(now, residual)  # what waits is kept where the parameter was not used
                waited |= bool(residual.any())
            if not everyone and not someone:
                assert ddp.module.extra.weight.grad is None  # DDP drops what a hook writes there
            sgd_step(ddp, update)
            assert before.numel() == update.numel()
        assert waited or scheme == "dense"
        state.close()
    return True


def test_locally_and_globally_unused_parameters_keep_their_residual():
    spawn_gloo(unused_parameters, 3, timeout=TIMEOUT)


def modes(rank, size):
    outcome = {}
    for name, options, accumulate in (
        ("no_sync", {}, 3),
        ("no_sync and bucket views", {"gradient_as_bucket_view": True}, 2),
        ("bucket views", {"gradient_as_bucket_view": True}, 1),
        ("static graph", {"static_graph": True}, 1),
        ("static graph and bucket views", {"static_graph": True, "gradient_as_bucket_view": True}, 1),
        ("one bucket", {"bucket_cap_mb": 25}, 1),
    ):
        ddp, state = sparse_ddp("gtopk", 0.05, ErrorFeedback(0.9), ddp_options=options)
        seen, data = buckets_seen(state), Data(rank)
        for step in range(5):
            batches = [data(10 * step + i) for i in range(accumulate)]
            sgd_step(ddp, check_step(ddp, state, batches, beta=0.9), 0.01)
        outcome[name] = len(seen) - 1, [len(layout) for layout in seen[:-1]], state.stats()["step"]
        state.close()
    return outcome


def test_accumulation_static_graph_and_bucket_views():
    for outcome in spawn_gloo(modes, 2, timeout=TIMEOUT):
        for name, (calls, buckets, steps) in outcome.items():
            assert calls == 5 == steps, name  # no_sync steps call no hook
            assert buckets[-1] == (1 if name == "one bucket" else 4), name


def half(rank, size, dtype):
    largest = 0.0
    for scheme in ("topk", "gtopk", "randomk", "dense"):
        ddp, state = sparse_ddp(scheme, 0.1, ErrorFeedback(), make_net(dtype=dtype))
        data = Data(rank, dtype)
        for step in range(5):
            update = check_step(ddp, state, [data(step)])
            sgd_step(ddp, update)
        residual = state.state_dict()["residual"]
        assert all(r.dtype == torch.float32 for r in residual.values())
        assert state.stats()["dense_bytes"] == 2 * 724
        largest = max(largest, float(memory_of(ddp, state).abs().max()))
        state.close()
    return largest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_modules_lose_nothing_to_rounding(dtype):
    assert all(value > 0 for value in spawn_gloo(half, 2, args=(dtype,), timeout=TIMEOUT))


def two_models(rank, size):
    pairs = [sparse_ddp("gtopk", 0.1, model=make_net(seed)) for seed in (0, 1)]
    data = Data(rank)
    for step in range(4):
        for i, (ddp, state) in enumerate(pairs):
            sgd_step(ddp, check_step(ddp, state, [data(2 * step + i)]))
    with pytest.raises(ValueError, match="has a model already"):
        register(wrap(make_net(2)), pairs[0][1])
    for _, state in pairs:
        state.close()
    messages = []
    for warm in (False, True):
        shared = make_state("topk")
        first, second = wrap(make_net(0)), wrap(make_net(1))
        for ddp in (first, second):
            ddp.register_comm_hook(shared, sparse_hook)
        if warm:  # the first model has its second layout
            for step in range(2):
                loss_of(first, data(step)).backward()
        loss_of(first, data(0)).backward()
        with pytest.raises(RuntimeError) as caught:
            loss_of(second, data(0)).backward()
        messages.append(str(caught.value))
        assert isinstance(shared.error, ValueError)
    return messages


def test_two_models_have_a_state_each_and_a_shared_one_raises():
    for messages in spawn_gloo(two_models, 2, timeout=TIMEOUT):
        assert all("each DDP model needs a state of its own" in m for m in messages), messages


def a_part_of_the_world(rank, size):
    """DDP over ranks 0 and 2 only; rank 1 knows nothing of it."""
    group = dist.new_group([0, 2])
    if rank == 1:
        dist.barrier()
        return None
    torch.manual_seed(0)
    ddp = wrap(make_net(), process_group=group)
    state = register(ddp, make_state("gtopk", 0.1))
    data = Data(rank)
    for step in range(3):
        loss_of(ddp, data(step)).backward()
    place = state.reducer.transport.rank, state.reducer.transport.world_size
    grads = torch.cat([p.grad.flatten() for p in ddp.parameters()])
    state.close()
    dist.barrier()
    return place, grads


def test_a_process_group_of_some_ranks():
    first, nothing, second = spawn_gloo(a_part_of_the_world, 3, timeout=TIMEOUT)
    assert nothing is None and first[0] == (0, 2) and second[0] == (1, 2)
    assert torch.equal(first[1], second[1])


def refusals(rank, size):
    said = {}
    ddp = wrap(make_net())
    for wrong in (ddp.module, "model"):
        with pytest.raises(TypeError, match="model must be a DistributedDataParallel"):
            register(wrong, make_state("topk"))
    with pytest.raises(TypeError, match="state must be a SparseState, got dict"):
        register(ddp, {})
    transport = in_process.group(3)[rank]
    with pytest.raises(ValueError, match="connects 3 ranks and DDP's process group 2"):
        register(ddp, SparseState(TopK(0.1), AllGather(transport)))

    class Odd(nn.Module):
        def __init__(self, parameter):
            super().__init__()
            self.parameter = nn.Parameter(parameter)

        def forward(self, x):
            return (self.parameter * x).sum().abs()

    for name, parameter in (
        ("complex", torch.ones(4, dtype=torch.complex64)),
        ("double", torch.ones(4, dtype=torch.float64)),
    ):
        odd = nn.parallel.DistributedDataParallel(Odd(parameter))
        with pytest.raises(TypeError, match=f"parameter is {parameter.dtype}: gradients must be float32"):
            register(odd, make_state("topk"))
        odd.register_comm_hook(make_state("topk"), sparse_hook)
        with pytest.raises(RuntimeError) as caught:
            odd(torch.ones(4)).backward()
        said[name] = str(caught.value)

    embedding = nn.parallel.DistributedDataParallel(nn.Embedding(10, 4, sparse=True))
    state = register(embedding, make_state("topk"))
    try:
        embedding(torch.tensor([1, 2])).sum().backward()
        said["sparse"] = "nothing"
    except (RuntimeError, TypeError) as error:
        said["sparse"] = f"{error} {state.error}"

    density = 0.1 if rank == 0 else 0.25
    ddp, state = sparse_ddp("gtopk", density)
    with pytest.raises(RuntimeError) as caught:
        loss_of(ddp, Data(rank)(0)).backward()
    said["mismatch"] = str(caught.value)
    assert isinstance(state.error, SettingsMismatchError)
    with pytest.raises(SettingsMismatchError):
        loss_of(ddp, Data(rank)(0))
    return said


def test_what_ddp_users_get_for_bad_input():
    for said in spawn_gloo(refusals, 2, timeout=TIMEOUT):
        for name, dtype in (("complex", "complex64"), ("double", "float64")):
            assert "TypeError" in said[name] and dtype in said[name] and "float32" in said[name], said[name]
        assert "dense" in said["sparse"], said["sparse"]
        for part in ("SettingsMismatchError", "rank 0", "rank 1", "0.1", "0.25"):
            assert part in said["mismatch"]


def momentum_twice(rank, size):
    ddp = wrap(make_net())
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.8)
    state = make_state("topk", 0.1, ErrorFeedback(0.9))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        register(ddp, state, optimizer)
        for step in range(3):
            loss_of(ddp, Data(rank)(step)).backward()
            optimizer.step()
    state.close()
    return [str(w.message) for w in caught if "momentum" in str(w.message)]


def test_a_second_momentum_is_warned_of_once():
    for messages in spawn_gloo(momentum_twice, 2, timeout=TIMEOUT):
        assert len(messages) == 1 and "0.8" in messages[0] and "0.9" in messages[0]


def learning_rates(rank, size):
    ddp = wrap(make_net())
    groups = [
        {"params": list(ddp.module.last.parameters())},
        {"params": list(ddp.module.first.parameters()), "lr": 0.2},
    ]
    groups.append({"params": [*ddp.module.inner.parameters(), *ddp.module.middle.parameters()]})
    optimizer = torch.optim.SGD(groups, lr=0.05)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: [1.0, 0.5, 0.5, 0.0, 0.25, 2.0, 1.0][t]
    )
    state = register(ddp, make_state("gtopk", 0.05, ErrorFeedback(rescale_with_lr=optimizer)))
    data, last = Data(rank), {}

    def rates():
        lr = {p: g["lr"] for g in optimizer.param_groups for p in g["params"]}
        return torch.cat([torch.full((p.numel(),), lr[p]) for _, p in sorted(ddp.module.named_parameters())])

    for step in range(6):
        w, u, g, eta = (
            parameters_of(ddp),
            memory_of(ddp, state),
            by_name(local_gradients(ddp, data(step))),
            rates(),
        )
        optimizer.zero_grad()
        loss_of(ddp, data(step)).backward()
        optimizer.step()
        if step and bool((eta != 0).all()):
            # In parameter units: what was withheld weighs by the rate of its own step (a rate of 0 keeps the last).
            left = parameters_of(ddp) - eta * mean_over_ranks(memory_of(ddp, state))
            right = w - last["eta"] * mean_over_ranks(u) - eta * mean_over_ranks(g)
            torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)
        last = {"eta": eta if bool((eta != 0).all()) else last["eta"]}
        scheduler.step()
    state.close()


def test_residuals_in_parameter_units_follow_a_schedule_by_group():
    spawn_gloo(learning_rates, 2, timeout=TIMEOUT)


def measured_delta(rank, size):
    ddp, state = sparse_ddp("gtopk", 0.1, delta_every=2)
    data, deltas = Data(rank), []
    for step in range(5):
        sgd_step(ddp, check_step(ddp, state, [data(step)]))
        deltas.append(state.stats()["delta"])
    state.close()
    return deltas


def test_delta_on_request():
    first, second = spawn_gloo(measured_delta, 2, timeout=TIMEOUT)
    assert first == second and all(0 < d < 2 for d in first)
    assert first[0] == first[1] != first[2] == first[3] != first[4]


def clipped(rank, size):
    ddp, state = sparse_ddp("topk", 1.0, ErrorFeedback(clip_norm=0.01))
    loss_of(ddp, Data(rank)(0)).backward()
    norm = float(torch.cat([p.grad.flatten() for p in ddp.parameters()]).norm())
    state.close()
    return norm


def test_clip_norm():
    """One bucket at the first step: each rank's gradient has norm 0.01, their mean no more."""
    norms = spawn_gloo(clipped, 2, timeout=TIMEOUT)
    assert norms[0] == norms[1] and 0.003 < norms[0] <= 0.01 * (1 + 1e-5)
