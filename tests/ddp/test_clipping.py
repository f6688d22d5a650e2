"""Clipping: by the norm of the whole model, a clip that leaves nothing, and a clip of the average behind the hook."""

import contextlib
import warnings

import pytest
import torch
from ddp_cases import SMALL_BUCKETS_MB, make_net
from launch import spawn_gloo
from torch.nn.parallel import DistributedDataParallel

from commhooks import AllGather, Bucket, ErrorFeedback, Reducer, SparseState, TopK, register
from commhooks.ddp.step_watch import StepWatch
from commhooks.transports import in_process

BOUND = 0.02


def batch(rank, step):
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(100 * step + rank))


def reference(rank, size):
    """Each rank's gradient clipped over the model, then averaged, then SGD's momentum: by hand."""
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for step in range(4):
        means = [torch.zeros_like(p) for p in net.parameters()]
        for other in range(size):
            optimizer.zero_grad()
            net(batch(other, step)).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), BOUND)
            for mean, p in zip(means, net.parameters(), strict=True):
                mean += p.grad / size
        for mean, p in zip(means, net.parameters(), strict=True):
            p.grad = mean
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def ours(rank, size, norm_over):
    ddp = DistributedDataParallel(make_net(), bucket_cap_mb=SMALL_BUCKETS_MB)
    memory = ErrorFeedback(0.9, clip_norm=BOUND, norm_over=norm_over)
    state = register(ddp, SparseState.topk(1.0, memory=memory, dense_crossover=False, timeout_s=20.0))
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    for step in range(4):
        optimizer.zero_grad()
        ddp(batch(rank, step)).square().mean().backward()
        optimizer.step()
    buckets = len({id(held) for held, _ in memory.table._place.values()})
    state.close()
    return torch.cat([p.detach().flatten() for p in ddp.parameters()]), buckets


def over_the_model(rank, size):
    expected, (found, buckets) = reference(rank, size), ours(rank, size, "model")
    other, _ = ours(rank, size, "bucket")
    return float((found - expected).abs().max()), float((other - expected).abs().max()), buckets


def test_the_norm_is_that_of_all_of_this_ranks_gradients():
    for exact, by_bucket, buckets in spawn_gloo(over_the_model, 2, timeout=60):
        assert exact < 1e-5 < 1e-3 < by_bucket and buckets > 2


def reducer(memory):
    return Reducer(TopK(0.5), AllGather(in_process.group(1)[0]), memory)


def test_without_the_norm_of_the_step_it_is_an_error_and_nothing_is_touched():
    memory = ErrorFeedback(clip_norm=1.0, norm_over="model")
    bucket = Bucket(0, torch.ones(4), ("w",), (4,))
    with pytest.raises(ValueError, match="norm_over='model' needs all gradients of a step"):
        reducer(memory).reduce(bucket)
    assert not memory.table.residual_norm()
    for bad, message in (
        ({"norm_over": "model"}, "needs clip_norm"),
        ({"clip_norm": 1, "norm_over": "x"}, "got 'x'"),
    ):
        with pytest.raises(ValueError, match=message):
            ErrorFeedback(**bad)


def test_a_bucket_with_nan_does_not_switch_the_clip_of_the_others_off():
    memory = ErrorFeedback(clip_norm=1.0, norm_over="model")
    state = SparseState(
        TopK(1.0), AllGather(in_process.group(1)[0]), memory, nonfinite="skip", dense_crossover=False
    )
    buffers = [torch.tensor([3.0, 4.0]), torch.tensor([1.0, torch.nan])]
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in buffers]
    first = state.submit(buffers[0], 0, (weights[0],), False)
    assert not first.done()  # it waits for the last one
    state.submit(buffers[1], 1, (weights[1],), True)
    first.wait()
    torch.testing.assert_close(buffers[0], torch.tensor([0.6, 0.8]))
    state.close()


def test_buckets_that_wait_are_given_back_when_the_step_is_given_up():
    memory = ErrorFeedback(clip_norm=1.0, norm_over="model")
    state = SparseState(TopK(1.0), AllGather(in_process.group(1)[0]), memory, dense_crossover=False)
    buffer, weight = torch.tensor([3.0, 4.0]), torch.nn.Parameter(torch.ones(2))
    first = state.submit(buffer, 0, (weight,), False)
    state.reset()
    assert first.wait().tolist() == [3.0, 4.0] and not state.stats()["residual_norm"]
    state.submit(buffer, 0, (weight,), True).wait()
    torch.testing.assert_close(buffer, torch.tensor([0.6, 0.8]))
    state.close()


@contextlib.contextmanager
def warned():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        texts = []
        yield texts
    texts.extend(str(w.message) for w in seen)


def test_a_clip_that_removes_nearly_everything_is_warned_of_once():
    for scale, expected in ((65536.0, 1), (1.0, 0)):
        reduce, generator = reducer(ErrorFeedback(clip_norm=1.0)), torch.Generator().manual_seed(0)
        with warned() as texts:
            for _ in range(60):
                for index in (0, 1):
                    gradient = scale * torch.randn(64, generator=generator)
                    reduce.reduce(Bucket(index, gradient, (f"w{index}",), (64,), is_last=index == 1))
        assert len(texts) == expected
        assert not texts or "clip_norm=1 removed" in texts[0] and "grad_scaler=scaler" in texts[0]
    with warned() as texts:  # with the scale the memory's units are the loss's
        reduce = reducer(ErrorFeedback(clip_norm=1.0))
        for _ in range(60):
            reduce.reduce(Bucket(0, 65536.0 * torch.randn(64), ("w",), (64,)), 65536.0)
    assert not texts


def behind_the_hook(rank, size, spoil, scheme="topk", steps=6, scale=1.0):
    """The warnings about clipping when `spoil(parameters, step)` changes the averages before the optimizer's step."""
    ddp = DistributedDataParallel(make_net())
    state = getattr(SparseState, scheme)(*([] if scheme == "dense" else [0.1]), timeout_s=20.0)
    register(ddp, state)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01)
    with warned() as texts:
        for step in range(steps):
            optimizer.zero_grad()
            (scale * ddp(batch(rank, step)).square().mean()).backward()
            spoil(list(ddp.parameters()), step)
            optimizer.step()
    state.close()
    return [text for text in texts if "clip" in text]


def clip(parameters, step):
    torch.nn.utils.clip_grad_norm_(parameters, 0.05)


def unscale(parameters, step):
    for p in parameters:
        p.grad /= 65536.0


def thirds(parameters, step):
    for p in parameters:
        p.grad /= 3.0


def clips(rank, size):
    return {
        "clip": behind_the_hook(rank, size, clip),
        "values": behind_the_hook(rank, size, lambda ps, _: torch.nn.utils.clip_grad_value_(ps, 1e-3)),
        "loose": behind_the_hook(rank, size, lambda ps, _: torch.nn.utils.clip_grad_norm_(ps, 1e6)),
        "unscaled": behind_the_hook(rank, size, unscale, scale=65536.0),
        "both": behind_the_hook(rank, size, lambda *a: (unscale(*a), clip(*a)), scale=65536.0),
        "thirds": behind_the_hook(rank, size, thirds),
        "dense": behind_the_hook(rank, size, clip, "dense"),
    }


def test_a_clip_of_the_sparse_average_is_warned_of_once():
    """Not a clip that leaves it, not a constant factor, not after a dense exchange; a GradScaler's has its own warning."""
    for found in spawn_gloo(clips, 2, timeout=90):
        assert {name: len(texts) for name, texts in found.items()} == {
            "clip": 1, "values": 1, "loose": 0, "unscaled": 1, "both": 1, "thirds": 0, "dense": 0,
        }, found  # fmt: skip
        assert all("Pass grad_scaler=scaler" in found[name][0] for name in ("unscaled", "both"))
        assert "% of what this step sent" in found["clip"][0] and "clip_norm=" in found["clip"][0]


class Counting(torch.Tensor):
    """Notes the largest tensor whose elements an operation reads."""

    read = 0

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function.__name__ not in ("__getitem__", "__get__", "numel", "dim", "is_contiguous"):
            with torch._C.DisableTorchFunctionSubclass():
                cls.read = max([cls.read, *(a.numel() for a in args if isinstance(a, torch.Tensor))])
        return super().__torch_function__(function, types, args, kwargs or {})


def test_looking_for_a_clip_does_not_read_a_large_bucket():
    """It once took longer than the step: 300 ms for 25.56M elements."""
    layers = [torch.nn.Parameter(torch.zeros(2**17 + 1)), torch.nn.Parameter(torch.zeros(2**20))]
    average = torch.zeros(2**17 + 1 + 2**20)
    average[2**18 - 1], average[2**19] = 3.0, 5.0
    bucket = Bucket(0, average.as_subclass(Counting), tuple(layers), (2**17 + 1, 2**20), in_memory_order=True)
    watch = StepWatch()
    for layer in layers:
        watch.add(layer)
    with warned() as texts:
        for factor in (0.6, 0.7):
            watch.remember_largest(bucket, 1.0)
            for layer, part in zip(layers, average.split([2**17 + 1, 2**20]), strict=True):
                layer.grad = factor * part
            layers[1].grad[2**19] = 100.0  # another element than the one that was remembered
            watch.stepped(frozenset(map(id, layers)))
    assert 2**17 < Counting.read <= 2**18
    assert len(texts) == 1 and "were scaled by 0.7 " in texts[0]


@pytest.mark.parametrize(("ranks", "noise"), [(4, 1.0), (16, 1.0), (16, 0.0)])
def test_the_bound_of_a_rank_for_a_bound_of_the_average(ranks, noise):
    """The guide's rule: with independent noise the average's norm is 1/sqrt(P) of a rank's, without noise the same."""
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(20_000, generator=generator) * (1.0 - noise)
    gradients = signal + noise * torch.randn(ranks, 20_000, generator=generator)
    ratio = float(gradients.norm(dim=1).mean() / gradients.mean(0).norm())
    assert ratio == pytest.approx(ranks**0.5 if noise else 1.0, rel=0.03)
