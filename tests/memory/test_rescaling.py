"""``rescale_with_lr``: which learning rate a parameter has, and what finding it costs."""

import math

import pytest
import torch

from commhooks import AllGather, Bucket, ErrorFeedback, Reducer, TopK
from commhooks.transports import in_process


class Counted(list):
    """Parameters of a group. Counts how often something goes through all of them."""

    walks = 0

    def __iter__(self):
        type(self).walks += 1
        return super().__iter__()


def parameters(count):
    return [torch.nn.Parameter(torch.zeros(2)) for _ in range(count)]


def factors_of(memory, given):
    """By parameter the factor of its residual, with a bucket for each parameter."""
    found = []
    for index, parameter in enumerate(given):
        bucket = Bucket(index, torch.ones(2), (parameter,), (2,))
        held, _ = memory.for_bucket(bucket)
        rescale = memory.operands(held, bucket, scale=None).rescale
        found.append(1.0 if rescale is None else rescale.item())
    return found


def test_a_step_does_not_go_through_all_parameters_for_each_bucket(monkeypatch):
    """With 10,000 parameters in 100 buckets that took seconds a step."""
    monkeypatch.setattr(Counted, "walks", 0)
    given = parameters(40)
    optimizer = torch.optim.SGD(given, lr=1.0)
    optimizer.param_groups[0]["params"] = Counted(given)
    memory = ErrorFeedback(rescale_with_lr=optimizer)
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 0.5**step
        assert factors_of(memory, given) == [1.0 if step == 0 else 2.0] * 40
    assert Counted.walks == 1


def test_a_parameter_has_the_rate_of_the_group_it_is_in_now():
    a, b, c = given = parameters(3)
    optimizer = torch.optim.SGD([{"params": [a], "lr": 1.0}, {"params": [b, c], "lr": 4.0}])
    memory = ErrorFeedback(rescale_with_lr=optimizer)
    assert factors_of(memory, given) == [1.0] * 3
    first, second = optimizer.param_groups
    first["params"][0], second["params"][0] = b, a  # both groups are as long as before
    assert factors_of(memory, given) == [0.25, 4.0, 1.0]
    optimizer.param_groups.reverse()
    assert factors_of(memory, given) == [1.0] * 3
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group["lr"] *= 2.0
    optimizer.load_state_dict(saved)  # makes the groups anew
    assert factors_of(memory, given) == [0.5] * 3
    optimizer.add_param_group({"params": (added := parameters(1)), "lr": 1.0})
    assert factors_of(memory, [*given, *added]) == [1.0] * 4
    del optimizer.param_groups[2]
    with pytest.raises(ValueError, match="rescale_with_lr: an unnamed parameter .2,. is not in the given"):
        factors_of(memory, added)


COSINE = [0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]


@pytest.mark.parametrize("rates", ([1.0, 0.0, 1.0], [0.0, 1.0], [*COSINE, 0.0, *COSINE]))
def test_nothing_is_lost_at_a_rate_of_0(rates):
    """applied + rate * residual == sum of rate * gradient; what was sent at rate 0 reached no model."""

    def work(transport):
        (p,) = parameters(1)
        optimizer, gradient = torch.optim.SGD([p], lr=1.0), torch.tensor([4.0, 3.0])
        reducer = Reducer(
            TopK(0.5), AllGather(transport), ErrorFeedback(rescale_with_lr=optimizer), dense_crossover=False
        )
        reducer.memory.table.names[p] = "p"
        applied = torch.zeros(2)
        for rate in rates:
            optimizer.param_groups[0]["lr"] = rate
            buffer = gradient.clone()
            reducer.reduce(Bucket(0, buffer, (p,), (2,)))
            applied += rate * buffer
            assert rate or not buffer.any()
        last = [rate for rate in rates if rate][-1]
        torch.testing.assert_close(
            applied + last * reducer.state_dict()["residual"]["p"], sum(rates) * gradient
        )

    in_process.run(2, work)
