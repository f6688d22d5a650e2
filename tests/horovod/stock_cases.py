"""Horovod's own optimizer with our compression. Run on several ranks by test_jobs.py."""

# ruff: noqa: B023  (what is defined in a loop here is called in the same turn)

import itertools

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
    raises,
    reduced,
    same_everywhere,
    train,
)
from torch import nn
from torch.nn import functional

from commhooks import ErrorFeedback, NonFiniteGradientError, SettingsMismatchError
from commhooks.horovod import Compression

SCHEMES = ("randomk", "topk")
attempts = itertools.count()


def wrap(scheme, density, made=None, options=None, fails=False, **horovod):
    """`fails`: names of its own, for operations that a failed step leaves under way are known by their names."""

    def make(model, optimizer):
        prefix = f"attempt{next(attempts)}." if fails else ""
        named = [(prefix + name, p) for name, p in model.named_parameters()]
        compression = getattr(Compression, scheme)(density, named, **(options or {}))
        if made is not None:
            made.append(compression)
        return hvd.DistributedOptimizer(optimizer, named_parameters=named, compression=compression, **horovod)

    return make


def dense(**horovod):
    return lambda model, optimizer: hvd.DistributedOptimizer(
        optimizer, named_parameters=model.named_parameters(), **horovod
    )


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
            model, _ = train(wrap(scheme, 1.0, **options), 3, lr=0.05, passes=passes)
            close(flat(model), flat(expected))
            assert same_everywhere(flat(model))


@case()
def equals_the_oracle():
    ranks = range(hvd.size())
    for scheme in SCHEMES:
        made = []
        model, _ = train(wrap(scheme, 0.1, made))
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
                return wrap(scheme, 0.1, groups=chosen, backward_passes_per_step=2)(model, optimizer)

            model, _ = train(make, passes=2)
            close(flat(model), oracle(scheme, 0.1, range(hvd.size()), passes=2)[0])


@case()
def equals_the_oracle_with_parameters_unused_on_some_ranks():
    for scheme in SCHEMES:
        seen = []

        def make(model, optimizer):
            seen.append(model)
            return wrap(scheme, 0.1)(model, optimizer)

        def look(step):
            assert seen[0].b.weight.grad is not None

        model, _ = train(make, drop=True, after=look)
        close(flat(model), oracle(scheme, 0.1, range(hvd.size()), drop=True)[0])
        assert same_everywhere(flat(model))


@case()
def momentum_in_the_memory_and_sum():
    for scheme in SCHEMES:
        options = {"memory": ErrorFeedback(momentum=0.9)}
        model, _ = train(wrap(scheme, 0.1, options=options, op=hvd.Sum), lr=0.02)
        close(flat(model), oracle(scheme, 0.1, range(hvd.size()), lr=0.02, momentum=0.9, total=True)[0])


@case(at_least=3)
def process_set():
    import jobs_sets

    chosen = jobs_sets.CHOSEN
    if not chosen.included():
        return
    for scheme in SCHEMES:
        options = {"process_set": chosen}
        model, _ = train(wrap(scheme, 0.1, options=options, process_set=chosen))
        close(flat(model), oracle(scheme, 0.1, chosen.ranks)[0])


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
        train(wrap(scheme, 0.1, made), steps=2)
        stats = made[0].stats()
        assert stats["bytes_sent"] == expected, (stats, expected)
        assert stats["dense_bytes"] == 4 * sum(sizes) and stats["step"] == 2


@case()
def saved_and_loaded_is_as_if_never_stopped():
    for scheme in SCHEMES:
        whole, _ = train(wrap(scheme, 0.1))
        made = []
        first, _ = train(wrap(scheme, 0.1, made), steps=3)
        again = []
        second = Net()  # the first one's hooks stay with it
        second.load_state_dict(first.state_dict())
        optimizer = wrap(scheme, 0.1, again)(second, torch.optim.SGD(second.parameters(), lr=0.1))
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
            optimizer = wrap(scheme, 0.2, made, op=op)(model, torch.optim.SGD(model.parameters(), lr=0.0))
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
def an_inf_never_enters_a_residual():
    inf_in_one_parameter("propagate")
    inf_in_one_parameter("skip")
    inf_in_one_parameter("error")


def inf_in_one_parameter(policy):
    """Rank P-1 multiplies one layer's gradient by Inf at step 3; conservation holds over the steps that count."""
    for scheme in SCHEMES:
        made, model = [], Net()
        optimizer = wrap(scheme, 0.1, made, {"nonfinite": policy}, fails=policy == "error")(
            model, torch.optim.SGD(model.parameters(), lr=0.1)
        )
        poison = {"factor": 1.0}
        model.out.weight.register_hook(lambda g: g * poison["factor"])
        put_in, taken_out = torch.zeros_like(flat(model)), torch.zeros_like(flat(model))
        for step in range(8):
            bad = step == 3
            poison["factor"] = float("inf") if bad and hvd.rank() == hvd.size() - 1 else 1.0
            optimizer.zero_grad()
            loss_of(model, hvd.rank(), step).backward()
            local = torch.cat(
                [
                    p.grad.flatten() if p.grad is not None else torch.zeros(p.numel())
                    for p in model.parameters()
                ]
            )
            if bad and policy == "error":
                raises(NonFiniteGradientError, "out.weight", optimizer.synchronize)
                assert made[0].core.memory.table.residual_norm() < float("inf")
                break
            optimizer.synchronize()
            averaged = torch.cat([p.grad.flatten() for p in model.parameters()])
            with optimizer.skip_synchronize():
                if not bad:
                    optimizer.step()
                    put_in += local
                    taken_out += averaged
                elif policy == "skip":
                    optimizer.step()
                    start = flat(model).numel() - model.out.weight.numel() - model.out.bias.numel()
                    end = start + model.out.weight.numel()
                    assert not averaged[start:end].any()
                    local[start:end] = 0.0
                    put_in += local
                    taken_out += averaged
                else:
                    assert model.out.weight.grad.isnan().all() and model.a.weight.grad.isfinite().all()
                    # the step is thrown away, its gradients with it; what the others sent is put back
                    kept = local.clone()
                    start = flat(model).numel() - model.out.weight.numel() - model.out.bias.numel()
                    kept[start : start + model.out.weight.numel()] = 0.0
                    put_in += kept
        if policy == "error":
            continue
        residual = made[0].state_dict()["residual"]
        mine = torch.cat([residual[name] for name, _ in model.named_parameters()])
        assert mine.isfinite().all()
        close(reduced(mine) + taken_out, reduced(put_in))
        assert made[0].stats()["nonfinite_steps"] == 1


@case()
def uneven_data_with_join():
    made = []
    model = Net()
    optimizer = wrap("randomk", 0.1, made)(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for epoch in range(2):
        for step in range(2 + hvd.rank()):
            optimizer.zero_grad()
            loss_of(model, hvd.rank(), step).backward()
            optimizer.step()
        hvd.join()
        steps = torch.tensor([float(made[0].core.steps()["a.weight"])])
        assert same_everywhere(steps)
        hvd.broadcast_parameters(model.state_dict(), root_rank=hvd.size() - 1)
    assert steps.item() == 4.0


@case()
def a_rank_without_a_step_cannot_join():
    for scheme in SCHEMES:
        model = Net()
        optimizer = wrap(scheme, 0.1, fails=True)(model, torch.optim.SGD(model.parameters(), lr=0.1))
        if hvd.rank() < hvd.size() - 1:
            loss_of(model, hvd.rank(), 0).backward()
            raises(ValueError, "hvd.join()", optimizer.synchronize)
        hvd.join()


@case()
def refused_options_name_themselves():
    def step(model, optimizer):
        loss_of(model, hvd.rank(), 0).backward()
        optimizer.step()

    for scheme in SCHEMES:
        model = Net()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        if hvd.size() in (2, 4):
            optimizer = wrap(scheme, 0.1, fails=True, op=hvd.Adasum)(model, sgd)
            raises(ValueError, "op=Adasum", lambda: step(model, optimizer))
        tensor = torch.ones(4)
        compression = getattr(Compression, scheme)(0.1, model.named_parameters())
        raises(ValueError, "named_parameters", lambda: hvd.allreduce(tensor, compression=compression))
        model = Net()
        optimizer = wrap(scheme, 0.1, fails=True, op=hvd.Max)(
            model, torch.optim.SGD(model.parameters(), lr=0.1)
        )
        raises(ValueError, "op must be hvd.Average or hvd.Sum", lambda: step(model, optimizer))

        class Bag(nn.Module):
            def __init__(self):
                super().__init__()
                self.table = nn.Embedding(10, 4, sparse=True)

        bag = Bag()
        optimizer = wrap(scheme, 0.1, fails=True, sparse_as_dense=True)(
            bag, torch.optim.SGD(bag.parameters(), lr=0.1)
        )
        raises(ValueError, "sparse_as_dense", lambda: bag.table(torch.tensor([1, 2])).sum().backward())
        for bad in (0.0, 1.5):
            raises(ValueError, "density", lambda: getattr(Compression, scheme)(bad, model.named_parameters()))
        raises(ValueError, "named_parameters", lambda: getattr(Compression, scheme)(0.1, []))
        raises(
            ValueError,
            "nonfinite",
            lambda: getattr(Compression, scheme)(0.1, model.named_parameters(), nonfinite="ignore"),
        )


@case()
def ranks_that_disagree_are_told():
    def step(scheme, density, options):
        model = Net()
        optimizer = wrap(scheme, density, options=options, fails=True)(
            model, torch.optim.SGD(model.parameters(), lr=0.1)
        )
        loss_of(model, hvd.rank(), 0).backward()
        optimizer.step()

    raises(SettingsMismatchError, "seed=0", lambda: step("randomk", 0.1, {"seed": int(hvd.rank() == 1)}))
    memory = ErrorFeedback(momentum=0.5 if hvd.rank() == 0 else 0.0)
    raises(SettingsMismatchError, "momentum=0.5", lambda: step("topk", 0.1, {"memory": memory}))

    class Talkative(ErrorFeedback):  # its settings do not fit in the message that is compared
        def describe(self):
            return "talk " * 200 + super().describe()

    memory = Talkative(momentum=0.5 if hvd.rank() == 0 else 0.0)
    raises(SettingsMismatchError, "talk", lambda: step("topk", 0.1, {"memory": memory}))
    density = 0.5 if hvd.rank() else 0.1
    raises(RuntimeError, "", lambda: step("randomk", density, {}))  # Horovod's own: shapes differ
    raises(SettingsMismatchError, "density", lambda: step("topk", density, {}))


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
        for distributed in (wrap(scheme, 1.0), dense()):
            model = Twins()
            optimizer = distributed(model, torch.optim.SGD(model.parameters(), lr=0.05))
            for step in range(4):
                optimizer.zero_grad()
                x, y = batch(hvd.rank(), step)
                functional.cross_entropy(model(x), y).backward()
                optimizer.step()
            results.append(flat(model))
        close(results[0], results[1])
