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
from wrapping import SMALL_MB, dense, ours, scheme

from commhooks import ErrorFeedback, SparseState, sparse_hook
from commhooks.horovod import Compression, DistributedOptimizer
from commhooks.horovod import transport as transports


@case()
def density_one_is_dense():
    for options in ({}, {"op": hvd.Sum}, {"backward_passes_per_step": 2}):
        passes = options.get("backward_passes_per_step", 1)
        expected, _ = train(dense(**options), 3, lr=0.05, passes=passes, drop=True)
        for name in ("topk", "gtopk", "tree", "randomk", "lossless"):
            model, optimizer = train(ours(name, 1.0, **options), 3, lr=0.05, passes=passes, drop=True)
            close(flat(model), flat(expected))
            assert same_everywhere(flat(model))
            assert len(optimizer._sync.buckets) > 2


@case()
def low_bit_gradients_and_what_their_owners_keep():
    model, optimizer = train(ours("lowbit"), 4, lr=0.05)
    assert same_everywhere(flat(model))
    before = optimizer.state_dict()["commhooks"].get("owned", {})
    optimizer.load_state_dict(optimizer.state_dict())
    after = optimizer.state_dict()["commhooks"].get("owned", {})
    assert before or hvd.rank() < hvd.size() - 1  # a bucket of one block belongs to the last rank
    assert before.keys() == after.keys()
    for name, pieces in before.items():
        assert all(torch.equal(kept, after[name][start]) for start, kept in pieces.items())


@case()
def transport_follows_the_launcher():
    _, optimizer = train(ours("gtopk"), steps=1)
    used = optimizer.sparse_state.reducer.transport
    assert used.name == ("mpi" if hvd.mpi_enabled() else "distributed")
    stats = optimizer.sparse_state.stats()
    assert stats["bytes_sent"] > 0 and stats["compression_ratio"] > 1
    if not hvd.mpi_enabled():
        model, state = Net(), SparseState.topk(0.1)
        # as SparseState.topk(0.1, transport="mpi"), without starting MPI
        state.reducer.connection.requested = "mpi"
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
    for name in ("topk", "gtopk", "tree", "randomk", "lowbit"):
        layouts = {}

        def spy(state, bucket):
            layouts[bucket.index()] = list(bucket.parameters())
            return sparse_hook(state, bucket)

        reference = Net()
        ddp = DistributedDataParallel(reference, find_unused_parameters=True, bucket_cap_mb=SMALL_MB)
        state = scheme(name, memory=ErrorFeedback(momentum=0.5))
        if hvd.mpi_enabled():  # the same transport, for the order of sums
            state.reducer.connection.requested = "mpi"
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
def sparse_adam_with_an_embedding_that_one_rank_does_not_use():
    """SparseAdam takes nothing but sparse gradients, also for a parameter without a gradient on this rank."""
    table, other = nn.Embedding(20, 4, sparse=True), nn.Embedding(20, 4, sparse=True)
    for p in (table.weight, other.weight):
        nn.init.ones_(p)
    named = [("table", table.weight), ("other", other.weight)]
    adam = torch.optim.SparseAdam([p for _, p in named], lr=0.1)
    state = SparseState.dense()
    optimizer = DistributedOptimizer(adam, named, state=state, sparse_as_dense=True)
    for _ in range(2):
        optimizer.zero_grad()
        loss = table(torch.tensor([1, 2])).sum()
        if hvd.rank() == 0:
            loss = loss + other(torch.tensor([5])).sum()
        loss.backward()
        optimizer.step()
    assert same_everywhere(table.weight) and same_everywhere(other.weight)
    for p, rows in ((table.weight, [1, 2]), (other.weight, [5])):
        assert (p != 1.0).any(1).nonzero().flatten().tolist() == rows


@case()
def a_scheduler_of_the_wrapped_optimizer_stays_right_after_a_load():
    """It holds the optimizer that was wrapped, whose groups a load replaced."""
    model = nn.Linear(3, 1, bias=False)
    inner = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(inner, 1, gamma=0.5)
    optimizer = DistributedOptimizer(inner, model.named_parameters(), state=SparseState.dense())

    def step():
        optimizer.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()

    step()
    scheduler.step()
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.25 and inner.param_groups is optimizer.param_groups
    before = model.weight.detach().clone()
    step()
    moved = (before - model.weight).flatten().tolist()  # momentum 0.9 of 1, plus 1, at a quarter
    assert all(abs(x - 0.475) < 1e-6 for x in moved), moved


@case()
def a_parameter_that_is_added_or_unfrozen_later_is_an_error():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    model[0].bias.requires_grad_(False)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = DistributedOptimizer(sgd, model.named_parameters(), state=SparseState.dense())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    model[0].bias.requires_grad_(True)
    model(torch.ones(1, 3)).sum().backward()
    raises(RuntimeError, "0.bias (group 0) was added or unfrozen after", optimizer.step)
    model[0].bias.requires_grad_(False)
    optimizer.step()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    raises(RuntimeError, "a parameter of shape (2,) (group 1) was added", optimizer.step)


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


@case()
def decay_and_nesterov_in_the_memory_are_dense_sgd():
    settings = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.2}

    def run(model, make, **given):
        optimizer = make(model, torch.optim.SGD(model.parameters(), lr=0.05, **given))
        for step in range(4):
            optimizer.zero_grad()
            loss_of(model, hvd.rank(), step).backward()
            optimizer.step()
        return flat(model)

    def channels_last(model):
        return model.to(memory_format=torch.channels_last)

    def stock(model, optimizer):
        named = list(model.named_parameters())
        compression = Compression.topk(1.0, named, memory=ErrorFeedback(**settings))
        return hvd.DistributedOptimizer(optimizer, named_parameters=named, compression=compression)

    expected = run(Net(), dense(), **settings)
    close(run(Net(), ours("topk", 1.0, ErrorFeedback(**settings))), expected)
    close(run(Net(), stock), expected)
    image = channels_last(Images())
    expected = images(Images(), dense(), **settings)  # Horovod itself refuses gradients in channels_last
    close(images(image, ours("topk", 1.0, ErrorFeedback(**settings))), expected)
    raises(
        ValueError,
        "op must be hvd.Average with weight decay",
        lambda: ours("topk", 1.0, ErrorFeedback(weight_decay=0.1), op=hvd.Sum)(
            image, torch.optim.SGD(image.parameters(), lr=0.1)
        ),
    )
    hvd.barrier()


@case()
def for_optimizer_moves_the_settings_under_both_optimizers():
    settings = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.2}

    def run(make):
        model = Net()
        optimizer = make(model, torch.optim.SGD(model.parameters(), lr=0.05, **settings))
        for step in range(4):
            optimizer.zero_grad()
            loss_of(model, hvd.rank(), step).backward()
            optimizer.step()
        optimizer.zero_grad()
        optimizer.param_groups[0]["momentum"] = 0.5
        loss_of(model, hvd.rank(), 4).backward()
        raises(ValueError, "cycle_momentum=False", optimizer.step)
        optimizer.synchronize()
        return flat(model)

    def stock(model, optimizer):
        named = list(model.named_parameters())
        made = Compression.for_optimizer(optimizer, named, 1.0, warmup_steps=0)
        assert made.state_dict()["moved"] == settings
        return hvd.DistributedOptimizer(optimizer, named_parameters=named, compression=made)

    def fused(model, optimizer):
        state = SparseState.for_optimizer(optimizer, 1.0, warmup_steps=0, dense_crossover=False)
        return DistributedOptimizer(optimizer, model.named_parameters(), state=state)

    def plain(model, optimizer):
        made = dense()(model, optimizer)
        made.register_step_pre_hook(lambda o, *_: None if o.param_groups[0]["momentum"] > 0.6 else refuse())
        return made

    def refuse():
        raise ValueError("cycle_momentum=False")

    expected = run(plain)
    close(run(stock), expected)
    close(run(fused), expected)
    hvd.barrier()


class Images(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3))


def images(model, make, **given):
    optimizer = make(model, torch.optim.SGD(model.parameters(), lr=0.05, **given))
    for step in range(4):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(10 * step + hvd.rank())
        model(torch.randn(2, 3, 8, 8, generator=generator)).square().mean().backward()
        optimizer.step()
    return flat(model)
