"""Every kind of run that train.py offers goes on from a checkpoint to the same bits.

A run has 10 steps of 2 epochs. A combination is resumed in one phase, the next one in the next; under `--stress` each
in all phases: within the density's warm-up, before, at and after the step where averaging begins, at the end of an
epoch, and between two synchronisations.
"""

import shutil
from pathlib import Path

import pytest
import sklearn.datasets  # noqa: F401  imported once, before the ranks are forked
import torch
import torch.distributed as dist
from launch import spawn_gloo
from test_train import assert_same, newest, parse
from training import averaging, checkpoint, loop, strategies
from training import launch as job_launch

MLP = ["--model", "mlp", "--hidden", 8]
BASE = ["--batch-size", 120, "--epochs", 2, "--bucket-mb", 0.002, "--quiet"]
PHASES = (1, 3, 4, 5, 7)
START = 4
SETTINGS_BYTES = 528  # a bucket's, to the one other rank; RestartedMomentum has two buckets


def every_gradient_scheme():
    """DDP with each scheme: plain, with all that a memory can do, without memory."""
    yield [
        "--scheme",
        "dense",
        "--momentum",
        0.9,
        "--weight-decay",
        0.01,
        "--lr-schedule",
        "exponential",
        "--clip-norm",
        1,
    ]
    for scheme in strategies.SPARSE:
        given = ["--scheme", scheme, "--density", 0.05]
        yield [
            *given,
            "--momentum",
            0.5,
            "--factor-masking",
            "--clip-norm",
            1,
            "--warmup",
            1,
            "--nesterov",
            "--weight-decay",
            0.1,
        ]
        if scheme not in ("topk", "gtopk", "randomk"):
            continue
        yield [*given, "--delta-every", 2, "--no-dense-crossover", "--lr-schedule", "cosine"]
        yield [*given, "--no-error-feedback", "--momentum", 0.5, "--lr-schedule", "step", "--lr-every", 1]
        optimizer = [*given, "--momentum", 0.5, "--momentum-in", "optimizer", "--nesterov"]
        yield [*optimizer, "--rescale-with-lr", "--lr-warmup", 4, "--warmup", 1, "--warmup-start", 0.5]


def every_averager():
    """Each averager with each scheme, as its compressor and as what reduces gradients first."""
    for scheme in ("dense", "topk", "gtopk"):
        compressed = ["--scheme", scheme, "--density", 0.2, "--period", 3]
        yield ["--averaging", "local", *compressed]
        yield ["--averaging", "block", *compressed, "--mu", 0.5, "--clip-norm", 1]
        yield ["--averaging", "restarted", *compressed, "--momentum", 0.9, "--nesterov"]
        first = [*compressed, "--averaging-start", START, "--warmup", 1]
        yield ["--averaging", "local", *first, "--momentum", 0.5]
        yield ["--averaging", "restarted", *first, "--momentum", 0.9]
    for scheme in strategies.SPARSE:
        yield ["--averaging", "stagewise", "--scheme", scheme, "--density", 0.2, "--momentum", 0.5]
    for outer in (["slowmo", "--outer-lr", 0.9, "--mu", 0.5], ["diloco"]):
        yield ["--averaging", *outer, "--period", 3]
    for kind in averaging.WIRED:
        yield ["--averaging", kind, "--period", 3, "--wire-bits", 1]
    for topology in averaging.TOPOLOGIES:
        yield ["--averaging", "decentralized", "--topology", topology, "--momentum", 0.9]
    for sync in ("growing", "one-shot", "suggested", "at:2,6"):
        yield ["--averaging", "local", "--sync", sync, "--period", 2]
    yield ["--averaging", "local", "--period", 3, "--model", "resnet20", "--buffers", "average"]


COMBINATIONS = [*every_gradient_scheme(), *every_averager()]


def resumed(given, step, folder, world):
    """Trains once; goes on from a step; the content of the last checkpoints of both."""
    whole, part = folder / "whole", folder / "part"
    given = [*BASE, *([] if "--model" in given else MLP), *given]
    loop.Run(parse(*given, "--checkpoint", whole, "--checkpoint-every", step), world).train()
    if world.is_main:
        shutil.copytree(whole / f"step-{step:08d}", part / f"step-{step:08d}")
    dist.barrier()
    run = loop.Run(parse(*given, "--checkpoint", part, "--checkpoint-every", 100, "--resume"), world)
    assert run.done == step
    run.train()
    return newest(whole), newest(part)


def without_traffic(part):
    """A part of a checkpoint without the counts of bytes; only the common part has them."""
    if "sums" not in part:
        return part
    return {**part, "sums": {k: v for k, v in part["sums"].items() if not k.startswith("bytes")}}


def assert_same_traffic(whole, part):
    """The counts are equal, but for the comparison of settings that a compressed averager repeats at a resume."""
    for name in ("bytes_sent", "bytes_received"):
        repeated = part["sums"][name] - whole["sums"][name]
        assert 0 <= repeated <= (2 * SETTINGS_BYTES if whole["options"]["averaging"] != "none" else 0), name


def differing(folder, combinations, first=0):
    """What does not end in the bits of the uninterrupted run, as text. `first`: the first one's phase."""

    def ranks(rank, size):
        checkpoint.KEPT = 100
        world = job_launch.World(rank, size, "torchrun", torch.device("cpu"))
        found = []
        for number, given in enumerate(combinations):
            step = PHASES[(first + number) % len(PHASES)]
            wholes, parts = resumed(given, step, folder / str(number), world)
            assert wholes[0]["step"] == 10
            try:
                for whole, part in zip(wholes, parts, strict=True):
                    assert_same(without_traffic(whole), without_traffic(part))
                assert_same_traffic(wholes[0], parts[0])
            except AssertionError as error:
                found.append(f"{' '.join(map(str, given))}, resumed at {step}: {error}")
            dist.barrier()
            if world.is_main:
                shutil.rmtree(folder / str(number))
        return found

    return spawn_gloo(ranks, 2, timeout=400)[0]


def pytest_generate_tests(metafunc):
    if "first" in metafunc.fixturenames:
        metafunc.parametrize("first", range(len(PHASES) if metafunc.config.getoption("--stress") else 1))


@pytest.mark.slow
def test_every_combination_goes_on_to_the_same_bits(tmp_path, first):
    found = differing(tmp_path, COMBINATIONS, first)
    assert not found, "\n".join(found)


def test_a_residual_that_is_not_saved_would_be_noticed(tmp_path, monkeypatch):
    from commhooks.averaging import PostLocalState

    monkeypatch.setattr(PostLocalState, "state_dict", lambda self: {"step": self.step})
    given = ["--averaging", "local", "--averaging-start", START, "--scheme", "gtopk", "--density", 0.1]
    assert differing(Path(tmp_path), [given], first=PHASES.index(3))
