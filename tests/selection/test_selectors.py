"""Selectors and density schedules."""

import pytest
import torch
from ranks import reducer, run_steps, step

from commhooks import (
    AllGather,
    Bucket,
    ErrorFeedback,
    ExponentialWarmup,
    RandomK,
    Reducer,
    ThresholdTopK,
    TopK,
)
from commhooks.native.fused import Fused
from commhooks.selection.density import ConstantDensity
from commhooks.selection.selectors import Selector
from commhooks.transports import in_process


@pytest.mark.parametrize("density", (True, 0.0, -0.1, 1.5, float("nan"), "0.1", None))
def test_no_density(density):
    for make in (ConstantDensity, lambda given: ExponentialWarmup(given, 4)):
        with pytest.raises(ValueError, match=rf"density must be in \(0, 1\], got {density!r}"):
            make(density)


def test_density_schedules():
    assert [ConstantDensity(0.1).density(t) for t in (0, 9)] == [0.1, 0.1]
    warm = ExponentialWarmup(0.001, 4, start=0.1)
    assert [warm.density(t) for t in range(6)] == pytest.approx([0.1, 0.1**1.5, 0.01, 0.1**2.5, 0.001, 0.001])
    by_epoch = ExponentialWarmup(0.001, warmup_epochs=2, steps_per_epoch=3, start=0.1)
    assert [by_epoch.density(t) for t in range(8)] == pytest.approx([0.1] * 3 + [0.01] * 3 + [0.001] * 2)


def test_k_is_per_bucket_and_rounds_up():
    selector = TopK(0.01)
    assert [selector.k(n, 0) for n in (0, 1, 99, 100, 101, 1000)] == [0, 1, 1, 1, 2, 10]
    assert TopK(0.1).k(30, 0) == 3  # 0.1 * 30 is above 3 in binary


def test_threshold_selection_is_near_top_k_and_never_over_k():
    generator = torch.Generator().manual_seed(0)
    gradients = [[torch.randn(5000, generator=generator)] for _ in range(5)]

    def work(transport):
        red = Reducer(ThresholdTopK(0.02), AllGather(transport), ErrorFeedback(), dense_crossover=False)
        counts = []
        for (g,) in gradients:
            g = g.clone()
            red.reduce(Bucket(0, g, ("p",), (5000,)))
            counts.append(int((g != 0).sum()))
        total = red.memory.table.state_dict()["residual"]["p"]
        return counts, total

    counts, _ = in_process.run(1, work)[0]
    assert all(50 <= c <= 100 for c in counts), counts


@pytest.mark.parametrize("selector", [TopK(0.2), RandomK(0.2, seed=3), ThresholdTopK(0.2)])
def test_selectors_leave_torchs_generator_alone_and_say_what_they_are(selector: Selector):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    in_process.run(
        2, lambda t: Reducer(selector, AllGather(t)).reduce(Bucket(0, torch.ones(10), ("p",), (10,)))
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert repr(selector).startswith(type(selector).__name__) and "0.2" in repr(selector)


def test_random_k_draws_another_mask_each_step_and_bucket():
    zeros = [[torch.ones(100)] * 2] * 3
    seen = run_steps(2, "shared", 0.1, zeros)
    masks = [tuple(ranks[0].output.nonzero().flatten().tolist()) for ranks in seen]
    assert len(set(masks)) == 3 and all(len(m) == 10 for m in masks)

    def work(transport):
        return [
            tuple(o.nonzero().flatten().tolist())
            for o in step(reducer("shared", transport, 0.1), [torch.ones(100)] * 4)
        ]

    assert len(set(in_process.run(2, work)[0])) == 4


@pytest.mark.parametrize(
    "n, density, steps",
    [(1, 1.0, 3), (100, 1.0, 3), (50, 0.02, 200), (5000, 0.02, 60), (200_000, 0.01, 120)],
)
@pytest.mark.parametrize("kind", ["equal", "normal"])
def test_a_threshold_starves_nothing(n, density, steps, kind):
    """Small buckets and equal magnitudes too: every step sends something, and the residual stays bounded."""
    generator = torch.Generator().manual_seed(n)
    g = torch.ones(n) if kind == "equal" else torch.randn(n, generator=generator)

    def work(transport):
        red = reducer("threshold", transport, density)
        total, sent = torch.zeros(n), []
        for _ in range(steps):
            buffer = g.clone()
            red.reduce(Bucket(0, buffer, ("p",), (n,)))
            total += buffer
            sent.append(int((buffer != 0).sum()))
        return total, sent, red.memory.table.state_dict()["residual"]["p"]

    total, sent, residual = in_process.run(1, work)[0]
    k = TopK(density).k(n, 0)
    assert min(sent) >= 1 and max(sent) <= k
    torch.testing.assert_close(total + residual, steps * g, rtol=1e-4, atol=1e-4)
    assert sum(sent) >= 0.3 * k * steps
    if kind == "equal":  # the starting place goes around, so that none is passed over for ever
        assert float(residual.max()) <= 3 / density


def test_what_a_threshold_takes_is_at_least_what_it_leaves():
    generator = torch.Generator().manual_seed(4)
    for n in (200, 70_000):
        fused = Fused(torch.randn(n, generator=generator), torch.zeros(n))
        selected = ThresholdTopK(0.01).select(fused, n // 100, step=0, mask_key=0)
        if int(selected.report[0]) < n // 100:
            taken = selected.values[: int(selected.report[0])].abs()
            assert float(taken.min()) >= float(fused.residual.abs().max())


def test_equal_gradients_pass_the_threshold_under_another_default_dtype():
    """All equal the threshold: an estimate rounded up to them would let none through."""
    torch.set_default_dtype(torch.float64)
    try:
        fused = Fused(torch.ones(1000, dtype=torch.float32), torch.zeros(1000, dtype=torch.float32))
        selected = ThresholdTopK(0.1).select(fused, 100, step=0, mask_key=0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert int(selected.report[0]) == 100
