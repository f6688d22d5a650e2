"""scripts/train.py --averaging: every kind trains, resumes bit for bit, and goes on with another number of ranks."""

import re
from contextlib import contextmanager

import pytest
import sklearn.datasets  # noqa: F401  imported once, before the ranks are forked
import torch
from launch import spawn_gloo
from training import averaging, loop, options
from training import launch as job_launch

from commhooks.wire.low_bit import BITS

BASE = [
    "--model",
    "mlp",
    "--hidden",
    32,
    "--batch-size",
    32,
    "--quiet",
    "--lr",
    0.2,
    "--epochs",
    1,
    "--log-every",
    50,
]
KINDS = {
    "local": ["--averaging", "local", "--period", 4],
    "growing": ["--averaging", "local", "--period", 8, "--sync", "growing"],
    "block+topk": ["--averaging", "block", "--scheme", "topk", "--density", 0.1, "--mu", 0.5],
    "restarted": ["--averaging", "restarted", "--momentum", 0.9, "--nesterov"],
    "restarted at": ["--averaging", "restarted", "--momentum", 0.9, "--sync", "at:5,9,22"],
    "decentralized": [
        "--averaging",
        "decentralized",
        "--period",
        1,
        "--topology",
        "complete",
        "--momentum",
        0.9,
    ],
    "post-local+gtopk": [
        "--averaging",
        "local",
        "--averaging-start",
        9,
        "--scheme",
        "gtopk",
        "--density",
        0.1,
    ],
    "stagewise": ["--averaging", "stagewise", "--scheme", "topk", "--density", 0.2, "--momentum", 0.5],
}


def parse(*arguments):
    return options.parse(list(map(str, arguments)))


def train(size, *runs):
    """One training after the other in the same forked ranks: summaries and final parameters of rank 0."""

    def ranks(rank, size):
        world = job_launch.World(rank, size, "torchrun", torch.device("cpu"))
        results = []
        for run in runs:
            job = loop.Run(parse(*run), world)
            summary = job.train()
            results.append((summary, [p.detach().tolist() for p in job.task.model.parameters()]))
        return results

    return spawn_gloo(ranks, size, timeout=120)[0]


def test_every_kind_trains_and_resumes_bit_for_bit(tmp_path):
    runs = []
    for kind, options_of_kind in KINDS.items():
        given = [*BASE, *options_of_kind]
        kept = [*given, "--checkpoint", tmp_path / kind, "--checkpoint-every", 13]
        runs += [given, [*kept, "--stop-after", 13], [*kept, "--resume"]]
    results = train(2, *runs)
    for number, kind in enumerate(KINDS):
        (straight, expected), (half, _), (resumed, found) = results[3 * number : 3 * number + 3]
        assert half["step"] == 13 and resumed["step"] == straight["step"] == 22, kind
        assert found == expected, kind
        assert straight["test_accuracy"] == resumed["test_accuracy"], kind
        assert straight["bytes_sent_per_step"] == pytest.approx(resumed["bytes_sent_per_step"], rel=0.1), kind
    summaries = {kind: results[3 * number][0] for number, kind in enumerate(KINDS)}
    assert summaries["restarted"]["test_accuracy"] > 0.5
    assert summaries["local"]["bytes_sent_per_step"] < summaries["local"]["gradient_bytes"] / 3
    assert summaries["block+topk"]["bytes_sent_per_step"] < summaries["block+topk"]["gradient_bytes"] / 20


@pytest.mark.parametrize("kind", ("block+topk", "diloco on a wire"))
def test_goes_on_with_another_number_of_ranks(tmp_path, kind):
    options = KINDS.get(kind, ["--averaging", "diloco", "--period", 4, "--wire-bits", 1])
    given = [*BASE, *options, "--checkpoint", tmp_path, "--checkpoint-every", 13]
    train(2, [*given, "--stop-after", 13])
    ((summary, _),) = train(3, [*given, "--resume"])
    assert summary["ranks"] == 3 and summary["step"] == 14


def test_behind_a_wire_an_evaluation_sends_nothing():
    """Also: the wire has every width that the package has."""

    def evaluated(rank, size):
        world = job_launch.World(rank, size, "torchrun", torch.device("cpu"))
        seen = []
        for wire in ([], ["--wire-bits", 16]):
            job = loop.Run(parse(*BASE, "--averaging", "local", "--period", 7, *wire), world)
            strategy, tensors = job.strategy, list(job.task.model.parameters())

            @contextmanager
            def evaluating(strategy=strategy, tensors=tensors, as_it_is=strategy.evaluating):
                before = strategy.transport.counters.bytes_sent
                own = [t.detach().clone() for t in tensors]
                with as_it_is():
                    sent = strategy.transport.counters.bytes_sent - before
                    common = [t.tolist() for t in tensors]
                    yield
                assert all(map(torch.equal, own, tensors))
                seen.append((sent, common, [t.tolist() for t in own]))

            strategy.evaluating = evaluating
            job.train()
        return seen

    here, there = spawn_gloo(evaluated, 2, timeout=60)
    assert len(here) == 2 and here[0][0] > 0 and here[1][0] == 0
    for (_, common, own), (_, of_the_other, _) in zip(here, there, strict=True):
        assert common == of_the_other and common != own
    assert averaging.WIRE_BITS == BITS


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        (["local", "--period", 7], [7, 14]),
        (["local", "--sync", "growing", "--period", 4], [1, 3, 7, 11, 15, 16]),
        (["restarted", "--sync", "growing", "--period", 4], [1, 3, 7, 11, 15, 16]),
        (["restarted", "--sync", "one-shot"], [16]),
        (["local", "--sync", "at:3,4"], [3, 4]),
        (["local", "--sync", "suggested", "--batch-size", 1], [2, 4, 6, 8, 10, 12, 14, 16]),  # sqrt(16 / 4)
        (["restarted", "--sync", "suggested", "--averaging-start", 14], [15, 16]),  # 4 / 8 is below 1
    ],
)
def test_sync_says_after_which_steps(given, steps):
    sync = averaging.sync_set(parse("--averaging", *given), 16, 4)
    assert [step for step in range(1, 17) if step in sync] == steps


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (["--averaging", "local", "--period", 0], "--period 0"),
        (["--averaging", "block", "--mu", 1.0], "--mu 1.0"),
        (["--averaging", "block", "--averaging-start", 5], "--averaging-start.*block"),
        (["--averaging", "restarted", "--momentum", 0, "--nesterov"], "--nesterov needs"),
        (["--averaging", "block", "--sync", "growing"], "--sync growing.*block has a --period"),
        (["--averaging", "decentralized", "--sync", "one-shot"], "--sync one-shot.*decentralized"),
        (["--averaging", "local", "--sync", "at"], "--sync at is none of"),
        (["--averaging", "local", "--sync", "at:4,0"], "--sync at:4,0: .*got 0"),
        (["--averaging", "local", "--sync", "at:4,x"], "--sync at:4,x: steps are whole numbers .*, got 'x'"),
        (["--averaging", "local", "--sync", "often"], "--sync often is none of"),
        (["--averaging", "local", "--sync", "growing", "--averaging-start", 3], "--averaging-start goes"),
        (["--averaging", "decentralized", "--scheme", "topk"], "--scheme topk"),
        (["--averaging", "stagewise"], "sparse hook"),
        (["--averaging", "stagewise", "--scheme", "topk", "--gamma", 0], "--gamma 0"),
    ],
)
def test_refuses_what_could_not_be_meant(given, shown, capsys):
    with pytest.raises(SystemExit):
        parse(*given)
    assert re.search(shown, capsys.readouterr().err)
