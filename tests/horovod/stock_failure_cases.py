"""Our compression where something is amiss: Inf, ranks that join or disagree, options. Run by test_jobs.py."""

# ruff: noqa: B023  (what is defined in a loop here is called in the same turn)

import horovod.torch as hvd
import torch
from common import (
    Net,
    case,
    close,
    flat,
    loss_of,
    raises,
    reduced,
    same_everywhere,
)
from torch import nn
from wrapping import SCHEMES, stock

from commhooks import ErrorFeedback, NonFiniteGradientError, SettingsMismatchError
from commhooks.horovod import Compression


@case()
def an_inf_never_enters_a_residual():
    inf_in_one_parameter("propagate")
    inf_in_one_parameter("skip")
    inf_in_one_parameter("error")


def inf_in_one_parameter(policy):
    """Rank P-1 multiplies one layer's gradient by Inf at step 3; conservation holds over the steps that count."""
    for scheme in SCHEMES:
        made, model = [], Net()
        optimizer = stock(scheme, 0.1, made, {"nonfinite": policy}, fails=policy == "error")(
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
    optimizer = stock("randomk", 0.1, made)(model, torch.optim.SGD(model.parameters(), lr=0.1))
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
def refused_options_name_themselves():
    def step(model, optimizer):
        loss_of(model, hvd.rank(), 0).backward()
        optimizer.step()

    for scheme in SCHEMES:
        model = Net()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        if hvd.size() in (2, 4):
            optimizer = stock(scheme, 0.1, fails=True, op=hvd.Adasum)(model, sgd)
            raises(ValueError, "op=Adasum", lambda: step(model, optimizer))
        tensor = torch.ones(4)
        compression = getattr(Compression, scheme)(0.1, model.named_parameters())
        raises(ValueError, "named_parameters", lambda: hvd.allreduce(tensor, compression=compression))
        model = Net()
        optimizer = stock(scheme, 0.1, fails=True, op=hvd.Max)(
            model, torch.optim.SGD(model.parameters(), lr=0.1)
        )
        raises(ValueError, "op must be hvd.Average or hvd.Sum", lambda: step(model, optimizer))

        class Bag(nn.Module):
            def __init__(self):
                super().__init__()
                self.table = nn.Embedding(10, 4, sparse=True)

        bag = Bag()
        optimizer = stock(scheme, 0.1, fails=True, sparse_as_dense=True)(
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
        optimizer = stock(scheme, density, options=options, fails=True)(
            model, torch.optim.SGD(model.parameters(), lr=0.1)
        )
        loss_of(model, hvd.rank(), 0).backward()
        optimizer.step()

    raises(SettingsMismatchError, "seed: ", lambda: step("randomk", 0.1, {"seed": int(hvd.rank() == 1)}))
    memory = ErrorFeedback(momentum=0.5 if hvd.rank() == 0 else 0.0)
    raises(SettingsMismatchError, "momentum: ", lambda: step("topk", 0.1, {"memory": memory}))

    class Talkative(ErrorFeedback):  # its settings do not fit in the message that is compared
        def settings(self):
            return {"talk": "talk " * 300, **super().settings()}

    memory = Talkative(momentum=0.5 if hvd.rank() == 0 else 0.0)
    raises(SettingsMismatchError, "by checksum", lambda: step("topk", 0.1, {"memory": memory}))
    density = 0.5 if hvd.rank() else 0.1
    raises(RuntimeError, "", lambda: step("randomk", density, {}))  # Horovod's own: shapes differ
    raises(SettingsMismatchError, "density", lambda: step("topk", density, {}))
