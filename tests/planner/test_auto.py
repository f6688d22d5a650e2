"""Probing, `SparseState.auto` and the `plan` command, between real ranks where it matters."""

import logging

import pytest
import torch
import torch.distributed as dist
from launch import run, spawn_gloo, torchrun
from torch.nn.parallel import DistributedDataParallel

from commhooks import NonFiniteGradientError, SparseState, register
from commhooks.planner import Costs, Plan, choose
from commhooks.planner.auto import sizes_of
from commhooks.reducer import Reducer
from commhooks.transports import in_process


def test_sizes():
    assert sizes_of(10) == (10, 0)
    model = torch.nn.Linear(4, 3)
    model.bias.requires_grad_(False)
    assert sizes_of(model) == (12, 12)
    for bad in (0, torch.nn.ReLU()):
        with pytest.raises(ValueError):
            sizes_of(bad)
    with pytest.raises(TypeError):
        sizes_of("resnet")


def _train(rank, size):
    """Steps with `auto`, with a forced plan of either kind, and plain DDP: what the hook leaves in .grad."""
    slow = Costs(1e-4, 8e-8, 1e-4, 1e-9, 3e-8, 1e-9, 1e-9, 1e-9, 1e-4)
    fast = Costs(1e-4, 1e-13, 1e-7, 0.0, 1e-6, 1e-7, 1e-7, 1e-7, 1e-2)
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("commhooks.planner").addHandler(handler)
    logging.getLogger("commhooks.planner").setLevel(logging.INFO)
    import commhooks.planner.auto as module

    results = {}
    for name, costs in (("probed", None), ("slow", slow), ("fast", fast)):
        torch.manual_seed(0)
        model = DistributedDataParallel(
            torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Linear(256, 4))
        )
        if costs is not None:
            module.probe = lambda transport, numel, device, costs=costs: costs
        state = SparseState.auto(model)
        register(model, state)
        for step in range(3):
            torch.manual_seed(100 * step + rank)
            model.zero_grad()
            model(torch.randn(8, 64)).square().mean().backward()
        grads = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
        local = torch.cat([p.grad.reshape(-1) for p in _reference(step, rank).parameters()])
        dist.all_reduce(local)
        results[name] = (
            state.plan.scheme,
            repr(state.plan),
            grads,
            local / size,
            state.stats()["bytes_sent"],
        )
        state.close()
    return results, len(records)


def _reference(step, rank):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Linear(256, 4))
    torch.manual_seed(100 * step + rank)
    model(torch.randn(8, 64)).square().mean().backward()
    return model


def test_auto_decides_alike_logs_once_and_trains():
    outcomes = spawn_gloo(_train, 3, timeout=60)
    for name in ("probed", "slow", "fast"):
        schemes, plans, grads, average, sent = zip(*(o[0][name] for o in outcomes))
        assert len(set(schemes)) == len(set(plans)) == 1
        assert all(torch.equal(g, grads[0]) for g in grads)
        if schemes[0] == "dense":
            assert torch.allclose(grads[0], average[0], atol=1e-6)
    assert outcomes[0][0]["slow"][0] != "dense" and outcomes[0][0]["fast"][0] == "dense"
    assert [o[1] for o in outcomes] == [3, 0, 0]


def _plain(policy):
    """Dense without memory: the plain path. NaN on one rank, then a good step."""

    def work(transport):
        from commhooks import Bucket, Dense

        reducer = Reducer(None, Dense(transport), None, nonfinite=policy)
        buffer = torch.full((6,), float(transport.rank))
        if transport.rank == 1:
            buffer[2] = float("nan")
        try:
            reducer.reduce(Bucket(0, buffer, ("w",), (6,)))
            raised = False
        except NonFiniteGradientError:
            raised = True
        good = torch.full((6,), float(transport.rank))
        reducer.reduce(Bucket(0, good, ("w",), (6,)))
        return buffer, raised, good, reducer.nonfinite_steps

    return in_process.run(3, work)


@pytest.mark.parametrize("policy", ("propagate", "skip", "error"))
def test_plain_all_reduce_keeps_the_policy(policy):
    for buffer, raised, good, steps in _plain(policy):
        assert torch.equal(good, torch.ones(6)) and steps == 1
        assert raised == (policy == "error")
        assert torch.equal(buffer, torch.zeros(6)) if policy == "skip" else bool(buffer[2].isnan())


def test_a_rule_of_ones_own_for_dense_buckets():
    from commhooks import AllGather, Bucket, ErrorFeedback, TopK

    def work(transport):
        rule = lambda numel, k, world_size: numel < 10  # noqa: E731
        reducer = Reducer(TopK(0.1), AllGather(transport), ErrorFeedback(), dense_crossover=rule)
        small, large = torch.arange(8.0), torch.arange(40.0)
        reducer.reduce(Bucket(0, small, ("a",), (8,), is_last=False))
        reducer.reduce(Bucket(1, large, ("b",), (40,)))
        return small, int((large != 0).sum())

    for small, sent in in_process.run(2, work):
        assert torch.equal(small, torch.arange(8.0)) and sent == 4


def test_the_plan_is_a_rule_that_can_be_pickled():
    import pickle

    plan = choose(Costs(1e-4, 8e-8, 1e-4, 1e-9, 3e-8, 1e-9, 1e-9, 1e-9, 1e-4), 10**6, 4)
    copy = pickle.loads(pickle.dumps(plan))
    assert isinstance(copy, Plan) and copy == plan


def test_plan_command_alone_and_with_bad_arguments():
    import sys

    alone = run([sys.executable, "-m", "commhooks", "plan", "--numel", "1e5"], timeout=60)
    assert "do not compress" in alone.stdout and "100,000 parameters, 1 ranks" in alone.stdout
    bad = run(
        [sys.executable, "-m", "commhooks", "plan", "--model", "torch.nn:ReLU"], timeout=60, check=False
    )
    assert bad.returncode == 2 and "no parameters" in bad.stderr


def test_plan_command_under_torchrun():
    script = "import sys\nfrom commhooks.cli import main\nsys.exit(main(['plan', '--numel', '2e6']))\n"
    done = torchrun(script, 2, timeout=90)
    assert done.stdout.count("added to a step") == 1 and "2,000,000 parameters, 2 ranks" in done.stdout
