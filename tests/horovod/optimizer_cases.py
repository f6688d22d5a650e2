"""commhooks.horovod.DistributedOptimizer. Run on several ranks by test_jobs.py."""

# ruff: noqa: B023  (what is defined in a loop here is called in the same turn)

import gc

import horovod.torch as hvd
import torch
import torch.distributed as dist
from common import (
    STEPS,
    Net,
    batch,
    case,
    close,
    flat,
    loss_of,
    oracle,
    raises,
    reduced,
    same_everywhere,
    train,
)
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from commhooks import (
    AllGather,
    ErrorFeedback,
    ExponentialWarmup,
    GTopK,
    RandomK,
    SharedIndices,
    SparseState,
    TopK,
    sparse_hook,
)
from commhooks.horovod import DistributedOptimizer
from commhooks.horovod import transport as transports

SMALL_MB = 0.0005  # several buckets even for these small models


def scheme(name, density=0.1, memory=None):
    options = {"dense_crossover": False, "timeout_s": 20.0}
    memory = memory or ErrorFeedback()
    return {
        "topk": lambda: SparseState(TopK(density), AllGather(), memory, **options),
        "gtopk": lambda: SparseState(TopK(density), GTopK(), memory, **options),
        "tree": lambda: SparseState(TopK(density), GTopK(algorithm="tree"), memory, **options),
        "randomk": lambda: SparseState(RandomK(density, seed=3), SharedIndices(), memory, **options),
    }[name]()


def ours(name, density=0.1, memory=None, **options):
    options.setdefault("bucket_cap_mb", SMALL_MB)

    def make(model, optimizer):
        state = scheme(name, density, memory)
        return DistributedOptimizer(optimizer, model.named_parameters(), state=state, **options)

    return make


def dense(**horovod):
    return lambda model, optimizer: hvd.DistributedOptimizer(
        optimizer, named_parameters=model.named_parameters(), **horovod
    )


@case()
def density_one_is_dense():
    for options in ({}, {"op": hvd.Sum}, {"backward_passes_per_step": 2}):
        passes = options.get("backward_passes_per_step", 1)
        expected, _ = train(dense(**options), 3, lr=0.05, passes=passes, drop=True)
        for name in ("topk", "gtopk", "tree", "randomk"):
            model, optimizer = train(ours(name, 1.0, **options), 3, lr=0.05, passes=passes, drop=True)
            close(flat(model), flat(expected))
            assert same_everywhere(flat(model))
            assert len(optimizer._sync.buckets) > 2


@case()
def transport_follows_the_launcher():
    _, optimizer = train(ours("gtopk"), steps=1)
    used = optimizer.sparse_state.reducer.aggregator.transport
    assert used.name == ("mpi" if hvd.mpi_enabled() else "distributed")
    stats = optimizer.sparse_state.stats()
    assert stats["bytes_sent"] > 0 and stats["compression_ratio"] > 1
    if not hvd.mpi_enabled():
        model, state = Net(), SparseState.topk(0.1)
        state.reducer.aggregator.requested = (
            "mpi"  # as SparseState.topk(0.1, transport="mpi"), without starting MPI
        )
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        raises(
            ValueError,
            "transport='mpi'",
            lambda: DistributedOptimizer(sgd, model.named_parameters(), state=state),
        )


@case()
def buckets_are_sent_while_backward_runs():
    model = Net()
    optimizer = ours("topk", groups=[[model.out.bias, model.out.weight]])(
        model, torch.optim.SGD(model.parameters(), lr=0.1)
    )
    seen = []
    model.a.weight.register_post_accumulate_grad_hook(lambda p: seen.append(optimizer._sync._next))
    x, _ = batch(hvd.rank(), 0)
    model.out(model.a(x).tanh()).sum().backward()
    assert seen[0] >= 1  # the group of `out` was on its way before the first layer had its gradient
    optimizer.step()
    assert optimizer._sync._next == 0 and model.b.weight.grad is not None


@case()
def equals_the_ddp_hook():
    """The same gradients, bucket partition, masks: bitwise the same weights as DDP with the hook."""
    if not dist.is_initialized():
        transports.open_default_group(hvd.global_process_set, 20.0)
    for name in ("topk", "gtopk", "tree", "randomk"):
        layouts = {}

        def spy(state, bucket):
            layouts[bucket.index()] = list(bucket.parameters())
            return sparse_hook(state, bucket)

        reference = Net()
        ddp = DistributedDataParallel(reference, find_unused_parameters=True, bucket_cap_mb=SMALL_MB)
        state = scheme(name, memory=ErrorFeedback(momentum=0.5))
        if hvd.mpi_enabled():  # the same transport, for the order of sums
            state.reducer.aggregator.requested = "mpi"
        ddp.register_comm_hook(state, spy)
        sgd = torch.optim.SGD(reference.parameters(), lr=0.1)
        for step in range(STEPS):
            sgd.zero_grad()
            x, y = batch(hvd.rank(), step)
            functional.cross_entropy(ddp(x, hvd.rank()), y).backward()
            sgd.step()
        assert len(layouts) > 2
        names = {p: n for n, p in reference.named_parameters()}
        order = [[names[p] for p in layouts[i]] for i in sorted(layouts)]

        def make(model, optimizer):
            by_name = dict(model.named_parameters())
            groups = [[by_name[n] for n in bucket] for bucket in order]
            return ours(name, memory=ErrorFeedback(momentum=0.5), groups=groups)(model, optimizer)

        model, optimizer = train(make)
        assert torch.equal(flat(model), flat(reference)), name
        assert optimizer.sparse_state.stats()["bytes_sent"] == state.stats()["bytes_sent"]
        state.close()
        del ddp
        gc.collect()


@case()
def top_k_equals_the_oracle():
    """One bucket per parameter makes it the oracle's top-k per parameter."""

    def make(model, optimizer):
        return ours("topk", groups=[[p] for p in model.parameters()])(model, optimizer)

    for drop in (False, True):
        model, _ = train(make, drop=drop)
        close(flat(model), oracle("topk", 0.1, range(hvd.size()), drop=drop)[0])


@case()
def conserves_every_gradient():
    for name in ("topk", "gtopk", "tree", "randomk"):
        for op in (hvd.Average, hvd.Sum):
            for dtype in (torch.float32, torch.bfloat16):
                model = Net(dtype=dtype)
                optimizer = ours(name, op=op, backward_passes_per_step=2)(
                    model, torch.optim.SGD(model.parameters(), lr=0.0)
                )
                put_in, taken_out = torch.zeros_like(flat(model)), torch.zeros_like(flat(model))
                for step in range(4):
                    optimizer.zero_grad()
                    for number in range(2):
                        loss_of(model, hvd.rank(), 2 * step + number, drop=True, dtype=dtype).backward()
                    put_in += _gradient(model)
                    optimizer.synchronize()
                    taken_out += _gradient(model)
                    with optimizer.skip_synchronize():
                        optimizer.step()
                residual = optimizer.state_dict()["commhooks"]["residual"]
                mine = torch.cat([residual[n] for n, _ in model.named_parameters()])
                close(reduced(mine, op) + taken_out, reduced(put_in, op), 2e-5 * hvd.size())


def _gradient(model):
    return torch.cat(
        [torch.zeros(p.numel()) if p.grad is None else p.grad.float().flatten() for p in model.parameters()]
    )


@case(at_least=3)
def process_set():
    import jobs_sets

    chosen = jobs_sets.CHOSEN
    if hvd.mpi_enabled() or dist.is_initialized():  # over gloo a process group of all ranks is there by now
        for name in ("topk", "gtopk"):
            model, optimizer = train(ours(name, 1.0, process_set=chosen), lr=0.05)
            expected, _ = train(dense(process_set=chosen), lr=0.05)
            close(flat(model), flat(expected))
            assert (optimizer.sparse_state is None) == (not chosen.included())
            assert ("commhooks" in optimizer.state_dict()) == chosen.included()


@case()
def synchronize_clip_and_step():
    for name in ("topk", "gtopk"):
        model = Net()
        optimizer = ours(name, 1.0)(model, torch.optim.SGD(model.parameters(), lr=0.1))
        reference = Net()
        theirs = dense()(reference, torch.optim.SGD(reference.parameters(), lr=0.1))
        for step in range(3):
            for m, o in ((model, optimizer), (reference, theirs)):
                o.zero_grad()
                loss_of(m, hvd.rank(), step).backward()
                o.synchronize()
                nn.utils.clip_grad_norm_(m.parameters(), 0.05)
                with o.skip_synchronize():
                    o.step()
        close(flat(model), flat(reference))


@case()
def misuse_is_named():
    model = Net()
    optimizer = ours("topk")(model, torch.optim.SGD(model.parameters(), lr=0.1))
    loss_of(model, hvd.rank(), 0).backward()
    raises(RuntimeError, "zero_grad()", optimizer.zero_grad)
    raises(RuntimeError, "backward_passes_per_step=1", lambda: loss_of(model, hvd.rank(), 1).backward())
    optimizer.step()
    optimizer.zero_grad()
    loss_of(model, hvd.rank(), 1).backward()
    optimizer.step()
    assert same_everywhere(flat(model))


@case()
def refused_options_name_themselves():
    model = Net()
    named = list(model.named_parameters())

    def attempt(**options):
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        return DistributedOptimizer(sgd, **{"named_parameters": named, "state": scheme("topk"), **options})

    for kind, text, options in (
        (ValueError, "op=Adasum", {"op": hvd.Adasum}),
        (ValueError, "op must be", {"op": hvd.Max}),
        (ValueError, "compression", {"compression": hvd.Compression.fp16}),
        (ValueError, "gradient_predivide_factor", {"gradient_predivide_factor": 2.0}),
        (ValueError, "backward_passes_per_step", {"backward_passes_per_step": 0}),
        (ValueError, "groups", {"groups": "two"}),
        (ValueError, "groups", {"groups": [[model.a.weight], [model.a.weight]]}),
        (ValueError, "num_groups", {"num_groups": -1}),
        (ValueError, "process_set", {"process_set": hvd.ProcessSet([0])}),
        (ValueError, "named_parameters", {"named_parameters": named[:2]}),
        (ValueError, "named_parameters", {"named_parameters": [("x", p) for _, p in named]}),
        (ValueError, "bucket_cap_mb", {"bucket_cap_mb": 0}),
        (TypeError, "state", {"state": None}),
    ):
        raises(kind, text, lambda: attempt(**options))
    state = scheme("topk")
    first = attempt(state=state)
    raises(ValueError, "state of its own", lambda: attempt(state=state))
    assert first is not None


@case()
def sparse_gradients():
    class Bag(nn.Module):
        def __init__(self, sparse):
            super().__init__()
            torch.manual_seed(5)
            self.table = nn.Embedding(30, 4, sparse=sparse)
            self.out = nn.Linear(4, 2)

        def forward(self, x):
            return self.out(self.table(x))

    def run(sparse, **options):
        model = Bag(sparse)
        optimizer = ours("topk", 0.2, **options)(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for step in range(3):
            optimizer.zero_grad()
            tokens = torch.randint(
                0, 30, (6,), generator=torch.Generator().manual_seed(10 * step + hvd.rank())
            )
            model(tokens).square().sum().backward()
            optimizer.step()
            assert model.table.weight.grad.is_sparse == sparse
        return flat(model)

    close(run(True, sparse_as_dense=True), run(False))
    raises(ValueError, "sparse_as_dense", lambda: run(True))
    hvd.barrier()


@case()
def saved_and_loaded_is_as_if_never_stopped():
    for name in ("topk", "gtopk", "randomk"):

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
        everyone = hvd.allgather_object(saved["commhooks"], name="cases.states")
        again.load_state_dict({**saved, "commhooks": everyone})  # what a run of any world size would load


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


@case()
def two_optimizers_at_once():
    first, second = Net(0), Net(1)
    a = ours("gtopk")(first, torch.optim.SGD(first.parameters(), lr=0.1))
    b = ours("randomk")(second, torch.optim.Adam(second.parameters(), lr=0.01))
    for step in range(3):
        a.zero_grad()
        b.zero_grad()
        (loss_of(first, hvd.rank(), step) + loss_of(second, hvd.rank(), step)).backward()
        a.step()
        b.step()
    assert isinstance(a, torch.optim.SGD) and isinstance(b, torch.optim.Adam)
    assert same_everywhere(flat(first)) and same_everywhere(flat(second))
