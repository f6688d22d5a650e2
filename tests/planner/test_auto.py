"""`SparseState.auto`, between real ranks where it matters."""

import inspect
import logging
import sys

import pytest
import torch
import torch.distributed as dist
from launch import mpiexec, run, spawn_gloo
from torch.nn.parallel import DistributedDataParallel

from commhooks import ErrorFeedback, NoMemory, NonFiniteGradientError, SparseState, register
from commhooks.planner import PROBE_TIMEOUT_S, Costs, Job, Plan, choose, plan_for, sizes_of
from commhooks.planner.plan import DEFAULT_BUCKET_MB, DENSITIES
from commhooks.reduction.reducer import Reducer
from commhooks.schemes import dense_memory
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
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("commhooks.planner").addHandler(handler)
    logging.getLogger("commhooks.planner").setLevel(logging.INFO)
    import commhooks.planner.measured as module

    results = {}
    for name, costs in (("probed", None), ("slow", SLOW), ("fast", FAST)):
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


SLOW = Costs(1e-4, 8e-8, 1e-4, 1e-9, 3e-8, 1e-9, 1e-9, 1e-9, 1e-4)
FAST = Costs(1e-4, 1e-13, 1e-7, 0.0, 1e-6, 1e-7, 1e-7, 1e-7, 1e-2)


def _with_memory(transport, memory):
    """Two steps of gradients of rank + 1: the averages, the memory, and whether the plan is dense."""
    state = SparseState.auto(10**6, transport, memory=memory())
    averages, parameters = [], (torch.empty(16, requires_grad=True),)
    for _ in range(2):
        buffer = torch.full((16,), transport.rank + 1.0)
        averages.append(state.submit(buffer, 0, parameters, True).wait()[0].item())
    state.close()
    return (*averages, repr(state.reducer.memory), state.plan.scheme == "dense")


def test_a_memory_is_for_either_kind_of_plan(monkeypatch):
    """Momentum is the only one there is, and clipping was asked for: a dense plan keeps both, and drops what has no use."""
    import commhooks.planner.measured as module

    memories = {
        "none": NoMemory,
        "plain": ErrorFeedback,
        "momentum": lambda: ErrorFeedback(momentum=0.5),
        "clip": lambda: ErrorFeedback(clip_norm=1.0),
    }
    found = {}
    for is_dense, costs in ((True, FAST), (False, SLOW)):
        monkeypatch.setattr(module, "probe", lambda transport, numel, device, costs=costs: costs)
        for name, memory in memories.items():
            one, other = in_process.run(2, lambda t, memory=memory: _with_memory(t, memory))
            assert one == other and one[3] == is_dense
            found[is_dense, name] = one[:3]
    assert found[True, "none"] == found[True, "plain"] == (1.5, 1.5, "NoMemory()")
    assert found[True, "momentum"][:2] == (1.5, 2.25) and "momentum=0.5" in found[True, "momentum"][2]
    assert found[True, "clip"][:2] == (0.25, 0.25)  # 16 elements of norm 1
    assert found[False, "none"][2] == "NoMemory()" and "ErrorFeedback" in found[False, "plain"][2]
    assert "momentum=0.5" in found[False, "momentum"][2] and "clip_norm=1.0" in found[False, "clip"][2]


def test_adamw_gets_few_bits_and_sgd_a_sparse_scheme(monkeypatch):
    """What is averaged by the chosen state, and that small buckets go densely in either case."""
    import commhooks.planner.measured as module

    monkeypatch.setattr(module, "probe", lambda transport, numel, device: SLOW)
    weights = [torch.nn.Parameter(torch.zeros(3))]
    optimizers = [
        (torch.optim.AdamW(weights), "lowbit4"),
        (torch.optim.RMSprop(weights), "lowbit4"),
        (torch.optim.SGD(weights, lr=0.1, momentum=0.9), "topk"),
        (None, "topk"),
    ]
    if hasattr(torch.optim, "Muon"):
        matrices = [torch.nn.Parameter(torch.zeros(3, 3))]
        optimizers.append((torch.optim.Muon(matrices), "lowbit4"))

    def work(transport, optimizer):
        state = SparseState.auto(10**6, transport, optimizer=optimizer)
        averages = []
        for index, size in enumerate((100_000, 8)):
            gradient = torch.full((size,), transport.rank + 1.0)
            parameters = (torch.empty(size, requires_grad=True),)
            averages.append(state.submit(gradient, index, parameters, index == 1).wait())
        sent = state.stats()["bytes_sent"]
        state.close()
        return state.plan.scheme, averages, sent, repr(state.reducer.aggregator)

    for optimizer, expected in optimizers:
        results = in_process.run(2, lambda t, optimizer=optimizer: work(t, optimizer))
        for scheme, (large, small), sent, aggregator in results:
            assert scheme == expected and torch.equal(small, torch.full((8,), 1.5))
            assert torch.equal(large, results[0][1][0])
            if expected == "lowbit4":
                assert "LowBit" in aggregator and "4" in aggregator
                torch.testing.assert_close(large, torch.full((100_000,), 1.5), rtol=0.02, atol=0.0)
                assert 50_000 < sent < 53_000


def test_a_memory_of_ones_own_is_kept():
    class Own(ErrorFeedback):
        pass

    own = Own()
    assert dense_memory(own) is own and type(dense_memory(ErrorFeedback())) is NoMemory
    masking = ErrorFeedback(0.9, factor_masking=True)
    assert dense_memory(masking) is masking


def _wrapped(rank, size):
    """A model of a small and a large bucket under a plan in which a sparse bucket costs 10 ms and a byte 1 us."""
    import commhooks.planner.measured as module

    timeouts = []

    def probe(transport, numel, device):
        timeouts.append(transport.timeout_s)
        return Costs(0.0, 1e-6, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1e-2)

    module.probe = probe
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(64, 256, bias=False), torch.nn.Linear(256, 4, bias=False))
    model = DistributedDataParallel(layers, bucket_cap_mb=0.003)
    state = SparseState.auto(model)
    register(model, state)
    for step in range(2):  # buckets are laid anew after the first
        model.zero_grad()
        torch.manual_seed(10 * step + rank)
        model(torch.randn(8, 64)).square().mean().backward()
    large, small = (int((layer.weight.grad != 0).sum()) for layer in layers)
    default = SparseState.auto(layers).plan.bucket_mb
    opened_s = state.reducer.transport.timeout_s
    state.close()
    return state.plan, small, large, opened_s, timeouts[0], default


def test_a_wrapped_models_plan_is_for_its_own_buckets_and_sends_small_ones_densely():
    for plan, small, large, timeout_s, probe_timeout_s, default in spawn_gloo(_wrapped, 2):
        assert plan.scheme != "dense" and plan.density == 0.01
        assert small == 1024 and 0 < large <= 2 * 164
        assert plan.bucket_mb == pytest.approx(0.003, rel=1e-3) and default == DEFAULT_BUCKET_MB
        assert timeout_s == 1800.0 and probe_timeout_s == PROBE_TIMEOUT_S == 60.0


def test_the_slowest_backward_counts(monkeypatch):
    import commhooks.planner.measured as module

    seen = []
    monkeypatch.setattr(module, "probe", lambda transport, numel, device: SLOW)
    monkeypatch.setattr(module, "choose", lambda c, job, p: seen.append(job.backward_s) or choose(c, job, p))
    in_process.run(3, lambda t: plan_for(t, Job(10**6, backward_s=0.01 * t.rank)))
    assert seen == [0.02] * (3 * module.ROUNDS)


def test_a_plan_without_native_kernels_is_made_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr("commhooks.planner.measured.probe", lambda transport, numel, device: SLOW)
    monkeypatch.setattr(
        "commhooks.planner.measured.why_slow", lambda device_type: f"no {device_type} kernels"
    )
    for plan in in_process.run(2, lambda t: plan_for(t, Job(10**6))):
        assert plan.scheme != "dense" and "rank 1 has no native kernels" in str(plan)
    assert "no cpu kernels. The plan is for them" in caplog.text


@pytest.mark.parametrize(
    "bad", ({"backward_s": float("nan")}, {"backward_s": -1.0}, {"densities": []}, {"densities": [2.0]})
)
def test_a_bad_request_is_refused_before_anything_is_opened(bad):
    with pytest.raises(ValueError, match="densities|backward_s"):
        SparseState.auto(10**6, **bad)


_OVER_MPI = """
from commhooks import SparseState
import torch
state = SparseState.auto(100_000, transport="mpi")
buffer = torch.full((100,), float(state.plan.world_size))
state.submit(buffer, 0, (torch.empty(100, requires_grad=True),), True).wait()
print(f"{state.plan.world_size}-{state.reducer.transport.name}")
state.close()
"""


@pytest.mark.mpi
@pytest.mark.mpi
def test_auto_over_mpi():
    done = mpiexec(_OVER_MPI, 2)
    assert done.stdout.count("2-mpi") == 2


def _plain(policy):
    """Dense without memory: the plain path. NaN on one rank, then a good step."""

    def work(transport):
        from commhooks import Bucket, Dense

        reducer = Reducer(None, Dense(transport), nonfinite=policy)
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
        return buffer, raised, good, reducer.stats()["nonfinite_steps"]

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

    plan = choose(Costs(1e-4, 8e-8, 1e-4, 1e-9, 3e-8, 1e-9, 1e-9, 1e-9, 1e-4), Job(10**6), 4)
    copy = pickle.loads(pickle.dumps(plan))
    assert isinstance(copy, Plan) and copy == plan


def test_autos_defaults_are_the_planners():
    defaults = {p.name: p.default for p in inspect.signature(SparseState.auto).parameters.values()}
    assert defaults["densities"] == DENSITIES and defaults["probe_timeout_s"] == PROBE_TIMEOUT_S


def test_the_planner_is_imported_when_it_is_used():
    """It costs more than half of what importing all the rest does."""
    code = "import sys, commhooks; print([m for m in sys.modules if m.startswith('commhooks.planner')])"
    assert run([sys.executable, "-c", code], timeout=60).stdout.strip() == "[]"
