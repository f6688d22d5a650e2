"""Weight decay and Nesterov's momentum in the memory: equal to dense SGD at density 1, conserved below."""

import pickle

import pytest
import torch

from commhooks import AllGather, Bucket, ErrorFeedback, Reducer, TopK
from commhooks.schemes import dense_memory
from commhooks.transports import in_process

SETTINGS = (
    {"weight_decay": 0.3},
    {"momentum": 0.9, "weight_decay": 0.3},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.3},
)


def parameters(dtype=torch.float32):
    torch.manual_seed(0)
    image = torch.randn(4, 3, 5, 5, dtype=dtype).contiguous(memory_format=torch.channels_last)
    return [torch.nn.Parameter(image), torch.nn.Parameter(torch.randn(7, dtype=dtype))]


def in_memory_order(tensors):
    """As DDP lays a bucket out: channels-last tensors keep their order in memory."""
    return torch.cat([t.permute(0, 2, 3, 1).flatten() if t.dim() == 4 else t for t in tensors])


def bucket_of(tensors, gradients, **more):
    numels = tuple(t.numel() for t in tensors)
    return Bucket(0, in_memory_order(gradients), tuple(tensors), numels, in_memory_order=True, **more)


def reducer(density, memory, transport=None, **options):
    alone = transport or in_process.group(1)[0]
    return Reducer(TopK(density), AllGather(alone), memory, dense_crossover=False, **options)


@pytest.mark.parametrize("settings", SETTINGS)
def test_at_density_one_it_is_dense_sgd_with_the_same_settings(settings):
    """Also with steps that are thrown away in between, and without memory of them."""
    ours, theirs = parameters(), parameters()
    sgd = torch.optim.SGD(theirs, lr=0.1, **settings)
    reduce = reducer(1.0, ErrorFeedback(**settings))
    for step in range(10):
        gradients = [torch.randn_like(p) for p in ours]
        if step == 5 and settings.get("weight_decay"):
            gradients = [torch.zeros_like(p) for p in ours]  # the L2 term is the whole gradient
        if step in (3, 7):
            spoiled = [gradients[0], gradients[1].index_fill(0, torch.tensor([2]), torch.nan)]
            bucket = bucket_of(ours, spoiled)
            reduce.reduce(bucket)
            assert bucket.buffer.isnan().all()
        bucket = bucket_of(ours, gradients)
        reduce.reduce(bucket)
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient
        sgd.step()
        with torch.no_grad():
            image, vector = bucket.buffer.split([300, 7])
            ours[0].sub_(0.1 * image.view(4, 5, 5, 3).permute(0, 3, 1, 2))
            ours[1].sub_(0.1 * vector)
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("undoable", (False, True))
@pytest.mark.parametrize("settings", (*SETTINGS, {"momentum": 0.9}))
def test_several_buckets_of_an_optimizer_step_are_one_of_their_sum(settings, undoable):
    """Some are thrown away in between, and in some a parameter's gradient is zero."""
    ours, theirs = parameters(), parameters()
    sgd = torch.optim.SGD(theirs, lr=0.1, **settings)
    reduce = reducer(1.0, ErrorFeedback(**settings), undoable=undoable)
    for step in range(8):
        applied = torch.zeros(307)
        totals = [torch.zeros_like(p) for p in ours]
        for i in range(1 + step % 4):
            same_step = frozenset({0, 1} if i else ())
            gradients = [torch.randn_like(p) for p in ours]
            if (step, i) in ((2, 0), (3, 2)):
                gradients[1].zero_()
            if (step, i) in ((2, 1), (3, 0), (7, 3)):
                spoiled = [gradients[0], gradients[1].index_fill(0, torch.tensor([2]), torch.nan)]
                reduce.reduce(bucket_of(ours, spoiled, same_step=same_step))
            bucket = bucket_of(ours, gradients, same_step=same_step)
            reduce.reduce(bucket)
            applied += bucket.buffer
            totals = [total + gradient for total, gradient in zip(totals, gradients, strict=True)]
        for parameter, total in zip(theirs, totals, strict=True):
            parameter.grad = total
        sgd.step()
        with torch.no_grad():
            image, vector = applied.split([300, 7])
            ours[0].sub_(0.1 * image.view(4, 5, 5, 3).permute(0, 3, 1, 2))
            ours[1].sub_(0.1 * vector)
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, atol=4e-6, rtol=1e-5)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("world_size", (1, 2, 3))
def test_what_is_not_sent_is_withheld(settings, world_size):
    """Per step and element: sum_p residual_p + P * update = sum_p corrected_p, from a simulation of the formulas."""
    beta, decay = settings.get("momentum", 0.0), settings.get("weight_decay", 0.0)

    def work(transport):
        weights = parameters()
        flat = in_memory_order([p.detach() for p in weights])
        reduce = reducer(0.1, ErrorFeedback(**settings), transport)
        torch.manual_seed(transport.rank)
        velocity, owed, applied = torch.zeros(307), torch.zeros(307), torch.zeros(307)
        for _ in range(6):
            gradients = [torch.randn_like(p) for p in weights]
            gradient = in_memory_order(gradients) + decay * flat
            velocity = beta * velocity + gradient
            owed += gradient + beta * velocity if settings.get("nesterov") else velocity
            bucket = bucket_of(weights, gradients)
            reduce.reduce(bucket)
            applied += bucket.buffer
        residual, _ = reduce.memory.for_bucket(bucket)
        return owed, residual.residual, applied

    found = in_process.run(world_size, work)
    owed, kept = sum(f[0] for f in found), sum(f[1] for f in found)
    torch.testing.assert_close(kept + world_size * found[0][2], owed, atol=1e-4, rtol=1e-4)
    assert bool(kept.any())


def test_a_decay_of_each_parameter_and_none_where_backward_did_not_come():
    first, second = parameters()
    memory = ErrorFeedback(weight_decay={first: 0.5, second: 0.0})
    reduce = reducer(1.0, memory)
    zeros = [torch.zeros_like(first), torch.zeros_like(second)]
    bucket = bucket_of((first, second), zeros)
    reduce.reduce(bucket)
    assert torch.equal(bucket.buffer, in_memory_order([0.5 * first.detach(), zeros[1]]))
    bucket = bucket_of((first, second), zeros, unreached=frozenset({0}))
    reduce.reduce(bucket)
    assert not bucket.buffer.any()
    assert memory.settings()["weight_decay"] == "0 for 1, 0.5 for 1"
    stranger = torch.nn.Parameter(torch.ones(2))
    memory.table.names[stranger] = "layer.bias"
    with pytest.raises(ValueError, match=r"weight_decay: layer\.bias is not among its parameters"):
        reduce.reduce(Bucket(1, torch.ones(2), (stranger,), (2,)))


def test_half_precision_gradients_get_the_whole_decay():
    """In bfloat16 the term would vanish beside the gradient; float16 would underflow."""
    for dtype in (torch.bfloat16, torch.float16):
        weights = [torch.nn.Parameter(torch.full((4,), 2.0, dtype=dtype))]
        memory = ErrorFeedback(weight_decay=1e-7)
        buffer = torch.full((4,), 64.0, dtype=dtype)  # scaled by 64
        reducer(1.0, memory).reduce(Bucket(0, buffer, tuple(weights), (4,)), 64.0)
        kept, _ = memory.for_bucket(Bucket(0, buffer, tuple(weights), (4,)))
        exact = 1.0 + 2e-7
        torch.testing.assert_close(
            buffer.float() / 64 + kept.residual, torch.full((4,), exact), atol=0, rtol=6e-8
        )
        assert buffer.dtype == dtype


def test_clipping_comes_before_the_decay_as_in_dense_training():
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    buffer = torch.tensor([30.0, 40.0])
    reducer(1.0, ErrorFeedback(weight_decay=0.5, clip_norm=5.0)).reduce(Bucket(0, buffer, (weight,), (2,)))
    torch.testing.assert_close(buffer, torch.tensor([3.5, 5.0]))


def test_discard_is_exact_with_nesterov_and_decay():
    weights = parameters()
    reduce = reducer(0.1, ErrorFeedback(0.9, nesterov=True, weight_decay=0.1), undoable=True)
    states = []
    for _ in range(3):
        bucket = bucket_of(weights, [torch.randn_like(p) for p in weights])
        reduce.reduce(bucket)
        held, _ = reduce.memory.for_bucket(bucket)
        states.append((held.residual.clone(), held.velocity.clone()))
    reduce.discard()
    assert torch.equal(held.residual, states[1][0]) and torch.equal(held.velocity, states[1][1])


def test_refusals_and_pickles():
    for bad in (-0.1, float("nan"), float("inf"), "0.1"):
        with pytest.raises(ValueError, match="weight_decay must be at least 0"):
            ErrorFeedback(weight_decay=bad)
    with pytest.raises(ValueError, match="nesterov=True is a form of momentum"):
        ErrorFeedback(nesterov=True)
    with pytest.raises(ValueError, match=r"weight decay needs the parameters, and 'w' is none"):
        reducer(1.0, ErrorFeedback(weight_decay=0.1)).reduce(Bucket(0, torch.ones(2), ("w",), (2,)))
    (weight,) = parameters()[1:]
    memory = pickle.loads(pickle.dumps(ErrorFeedback(weight_decay={weight: 0.1})))
    with pytest.raises(ValueError, match="set memory.weight_decay again"):
        reducer(1.0, memory).reduce(Bucket(0, torch.ones(7), (weight,), (7,)))
    assert pickle.loads(pickle.dumps(ErrorFeedback(weight_decay=0.1))).weight_decay == 0.1
    decays = ErrorFeedback(weight_decay=0.1)
    assert dense_memory(decays) is decays


def test_nesterov_with_the_rate_in_the_residual():
    """At density 1 everything is sent and the rate in the residual changes nothing; below, u is scaled and v is not."""
    weights = parameters()
    sgd = torch.optim.SGD(weights, lr=0.1)
    memory = ErrorFeedback(0.9, nesterov=True, rescale_with_lr=sgd)
    reduce = reducer(0.2, memory)
    torch.manual_seed(1)
    velocity, owed, rate = torch.zeros(307), torch.zeros(307), 0.1
    for step in range(5):
        before, rate = rate, 0.1 / (step + 1)
        sgd.param_groups[0]["lr"] = rate
        gradients = [torch.randn_like(p) for p in weights]
        velocity = 0.9 * velocity + in_memory_order(gradients)
        owed = owed * (before / rate) + in_memory_order(gradients) + 0.9 * velocity
        bucket = bucket_of(weights, gradients)
        reduce.reduce(bucket)
        owed -= bucket.buffer
        held, _ = memory.for_bucket(bucket)
        torch.testing.assert_close(held.residual, owed, atol=1e-4, rtol=1e-4)
