"""examples/reference_step.py, the method in plain torch, gives the library's bits at every number of ranks."""

import importlib.util

import pytest
import torch
from launch import ROOT
from ranks import assert_same_bits, run_steps

from commhooks import ErrorFeedback

N, DENSITY, STEPS = 70, 0.1, 6


@pytest.fixture(scope="module")
def reference():
    spec = importlib.util.spec_from_file_location("reference_step", ROOT / "examples" / "reference_step.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gradients(world_size, kind):
    """``[step][rank]`` (N,) float32: normal ones, integers with many ties and zeros, or near the end of the range."""
    generator = torch.Generator().manual_seed(world_size)
    draws = torch.randn(STEPS, world_size, N, generator=generator)
    return {
        "normal": draws,
        "ties": draws.round(),
        "tiny": draws * 1e-44,
        "signed zeros": draws.trunc() * -0.5,
    }[kind]


@pytest.mark.parametrize("kind", ["normal", "ties", "tiny", "signed zeros"])
@pytest.mark.parametrize("scheme", ["union", "gtopk"])
@pytest.mark.parametrize("masking", [True, False])
def test_equals_the_library_bit_for_bit(reference, kind, scheme, masking):
    exchange = {"union": reference.all_gather, "gtopk": reference.gtop_k}[scheme]
    for world_size in (1, 2, 3, 4, 5, 8):
        given = gradients(world_size, kind)
        expected = run_steps(
            world_size,
            scheme,
            DENSITY,
            given,
            memory=lambda: ErrorFeedback(momentum=0.9, factor_masking=masking),
            average=True,
        )
        residuals, velocities = torch.zeros(2, world_size, N)
        for step, seen in zip(given, expected, strict=True):
            average = reference.step(list(step), list(residuals), list(velocities), 7, 0.9, exchange, masking)
            for rank, (output, residual, velocity) in enumerate(
                (s.output, s.residual, s.velocity) for s in seen
            ):
                assert_same_bits(average, output)
                assert_same_bits(residuals[rank], residual)
                assert_same_bits(velocities[rank], velocity)


def test_all_that_is_sent_or_kept_at_density_one(reference):
    """k = n: everything goes, the velocity is not masked, and the residual stays empty."""
    given = gradients(3, "normal")
    residuals, velocities = torch.zeros(2, 3, N)
    expected = torch.zeros(N)
    for step in given:
        average = reference.step(list(step), list(residuals), list(velocities), N, 0.5, reference.all_gather)
        expected = 0.5 * expected + step.mean(0)
        assert torch.allclose(average, expected, atol=1e-6) and not residuals.any()
