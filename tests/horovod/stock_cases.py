"""Horovod's own optimizer with our compression. Run on several ranks by test_jobs.py."""

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
    oracle,
    reduced,
    same_everywhere,
    train,
)
from torch import nn
from torch.nn import functional
from wrapping import SCHEMES, dense, stock

from commhooks import ErrorFeedback
from commhooks.horovod import Compression


@case()
def is_a_horovod_compressor():
    compression = Compression.topk(0.1, Net().named_parameters())
    assert isinstance(compression, hvd.compression.Compressor)


@case()
def density_one_is_dense():
    for options in (
        {},
        {"op": hvd.Sum},
        {"groups": 2},
        {"gradient_predivide_factor": 2.0},
        {"backward_passes_per_step": 2},
    ):
        passes = options.get("backward_passes_per_step", 1)
        expected, _ = train(dense(**options), 3, lr=0.05, passes=passes)
        for scheme in SCHEMES:
            model, _ = train(stock(scheme, 1.0, **options), 3, lr=0.05, passes=passes)
            close(flat(model), flat(expected))
            assert same_everywhere(flat(model))


@case()
def equals_the_oracle():
    ranks = range(hvd.size())
    for scheme in SCHEMES:
        made = []
        model, _ = train(stock(scheme, 0.1, made))
        expected, residuals = oracle(scheme, 0.1, ranks)
        close(flat(model), expected)
        mine = made[0].state_dict()["residual"]
        for name, value in residuals[hvd.rank()].items():
            close(mine[name], value)
        assert same_everywhere(flat(model))


@case()
def equals_the_oracle_in_groups_with_two_passes():
    for scheme in SCHEMES:
        for groups in (2, "lists"):

            def make(model, optimizer):
                lists = [[model.a.weight, model.b.weight], [model.out.weight, model.out.bias]]
                chosen = groups if groups == 2 else lists
                return stock(scheme, 0.1, groups=chosen, backward_passes_per_step=2)(model, optimizer)

            model, _ = train(make, passes=2)
            close(flat(model), oracle(scheme, 0.1, range(hvd.size()), passes=2)[0])


@case()
def equals_the_oracle_with_parameters_unused_on_some_ranks():
    for scheme in SCHEMES:
        seen = []

        def make(model, optimizer):
            seen.append(model)
            return stock(scheme, 0.1)(model, optimizer)

        def look(step):
            assert seen[0].b.weight.grad is not None

        model, _ = train(make, drop=True, after=look)
        close(flat(model), oracle(scheme, 0.1, range(hvd.size()), drop=True)[0])
        assert same_everywhere(flat(model))


@case()
def momentum_in_the_memory_and_sum():
    for scheme in SCHEMES:
        options = {"memory": ErrorFeedback(momentum=0.9)}
        model, _ = train(stock(scheme, 0.1, options=options, op=hvd.Sum), lr=0.02)
        close(flat(model), oracle(scheme, 0.1, range(hvd.size()), lr=0.02, momentum=0.9, total=True)[0])


@case(at_least=3)
def process_set():
    import jobs_sets

    chosen = jobs_sets.CHOSEN
    if not chosen.included():
        return
    for scheme in SCHEMES:
        options = {"process_set": chosen}
        model, _ = train(stock(scheme, 0.1, options=options, process_set=chosen))
        close(flat(model), oracle(scheme, 0.1, chosen.ranks)[0])


@case()
def two_models_with_equal_parameter_names():
    """Both are under way at the same time: Horovod takes one operation of a name."""

    def run(compressed):
        models = [Net(0), Net(1)]
        optimizers = []
        for number, model in enumerate(models):
            chosen = Compression.topk(1.0, model.named_parameters()) if compressed else hvd.Compression.none
            named = [(f"model{number}.{name}", p) for name, p in model.named_parameters()]
            sgd = torch.optim.SGD(model.parameters(), lr=0.1)
            optimizers.append(hvd.DistributedOptimizer(sgd, named, compression=chosen))
        for step in range(2):
            for optimizer in optimizers:
                optimizer.zero_grad()
            sum(loss_of(model, hvd.rank(), step) for model in models).backward()
            for optimizer in optimizers:
                optimizer.step()
        return torch.cat([flat(model) for model in models])

    close(run(True), run(False))


@case()
def bytes_on_the_wire():
    world = hvd.size()
    sizes = [p.numel() for p in Net().parameters()]
    ks = [max(1, -(-n // 10)) for n in sizes]
    for scheme, expected in (
        ("randomk", sum(2 * (world - 1) * 4 * (k + 1) // world for k in ks)),
        ("topk", sum((world - 1) * (8 * k + 16) for k in ks)),
    ):
        made = []
        train(stock(scheme, 0.1, made), steps=2)
        stats = made[0].stats()
        assert stats["bytes_sent"] == expected, (stats, expected)
        assert stats["dense_bytes"] == 4 * sum(sizes) and stats["step"] == 2


@case()
def saved_and_loaded_is_as_if_never_stopped():
    for scheme in SCHEMES:
        whole, _ = train(stock(scheme, 0.1))
        made = []
        first, _ = train(stock(scheme, 0.1, made), steps=3)
        again = []
        second = Net()  # the first one's hooks stay with it
        second.load_state_dict(first.state_dict())
        optimizer = stock(scheme, 0.1, again)(second, torch.optim.SGD(second.parameters(), lr=0.1))
        again[0].load_state_dict(made[0].state_dict())
        for step in range(3, STEPS):
            optimizer.zero_grad()
            loss_of(second, hvd.rank(), step).backward()
            optimizer.step()
        close(flat(second), flat(whole), 1e-6)  # Horovod's sums of three depend on what it happens to fuse


@case()
def half_precision_conserves():
    for scheme in SCHEMES:
        for op in (hvd.Average, hvd.Sum):
            model, made = Net(dtype=torch.bfloat16), []
            optimizer = stock(scheme, 0.2, made, op=op)(model, torch.optim.SGD(model.parameters(), lr=0.0))
            put_in = torch.zeros_like(flat(model))
            taken_out = torch.zeros_like(put_in)
            for step in range(4):
                optimizer.zero_grad()
                loss_of(model, hvd.rank(), step, dtype=torch.bfloat16).backward()
                put_in += torch.cat(
                    [
                        p.grad.float().flatten() if p.grad is not None else torch.zeros(p.numel())
                        for p in model.parameters()
                    ]
                )
                optimizer.synchronize()
                taken_out += torch.cat([p.grad.float().flatten() for p in model.parameters()])
                with optimizer.skip_synchronize():
                    optimizer.step()
            residual = made[0].state_dict()["residual"]
            mine = torch.cat([residual[name] for name, _ in model.named_parameters()])
            left, right = reduced(mine, op) + taken_out, reduced(put_in, op)
            close(left, right, 1e-5 * hvd.size())


@case()
def gradients_are_found_by_identity_in_any_order():
    """Layers of one shape whose gradients are ready in another order on each rank."""

    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(6))

        def forward(self, x):
            order = torch.randperm(6, generator=torch.Generator().manual_seed(hvd.rank())).tolist()
            return sum(self.layers[i](x * (i + 1)) for i in order)

    for scheme in SCHEMES:
        results = []
        for distributed in (stock(scheme, 1.0), dense()):
            model = Twins()
            optimizer = distributed(model, torch.optim.SGD(model.parameters(), lr=0.05))
            for step in range(4):
                optimizer.zero_grad()
                x, y = batch(hvd.rank(), step)
                functional.cross_entropy(model(x), y).backward()
                optimizer.step()
            results.append(flat(model))
        close(results[0], results[1])
