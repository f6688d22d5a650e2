"""scripts/accuracy --slow-links: its commands, the order of its runs, its choice of rates, and how it goes on."""

import pytest
import torch
from launch import spawn_gloo
from studies import slow_links
from training import gpt, options
from training import launch as job_launch


def record(method, lr, seed, loss, ranks=4):
    return {"bench": "run", "method": method, "ranks": ranks, "lr": lr, "seed": seed, "loss": loss}


def test_every_command_is_one_of_train_py():
    assert slow_links.STEPS % 4 == slow_links.STEPS % 14 == 0
    for method in slow_links.METHODS:
        parsed = options.parse(slow_links.command(method, 0.002, 2))
        assert (parsed.lr, parsed.seed, parsed.steps) == (0.002, 2, slow_links.STEPS)
        assert parsed.optimizer == ("muon" if "muon" in method else "adamw")
        assert (parsed.wire_bits == 1) == (parsed.averaging == "diloco") == (" k" in method)
        assert parsed.averaging == "none" or parsed.period == int(method.rpartition("k")[2])
        assert parsed.clip_norm == 1.0


def test_every_method_runs_once_before_any_runs_twice_and_the_seeds_take_the_best_rate():
    done, methods = [], list(slow_links.METHODS)
    for number, labels in enumerate(slow_links.left(done, 4, (2.0, 1.0, 4.0), (0, 1, 2))):
        assert labels["method"] == methods[number % len(methods)]
        # the last method is best at 4, the others at 1; a run that diverged is not the best
        best = 4.0 if labels["method"] == methods[-1] else 1.0
        loss = None if labels["lr"] == 2.0 else abs(labels["lr"] - best)
        if labels["seed"] > 0:
            assert labels["lr"] == best
        done.append(record(**{**labels, "loss": loss}))
    assert len(done) == len(methods) * 5
    assert list(slow_links.left(done, 4, (2.0, 1.0, 4.0), (0, 1, 2))) == []
    wide = list(slow_links.left(done, 8, (2.0, 1.0, 4.0), (0, 1, 2)))
    assert [(one["method"], one["lr"], one["seed"]) for one in wide] == [
        ("muon k4", 1.0, seed) for seed in (0, 1, 2)
    ]
    with pytest.raises(ValueError, match="muon k4 has no run on 4 ranks"):
        next(slow_links.left([], 8, (2.0,), (0,)))


def test_a_short_study_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    """Two steps of a tiny GPT by every method; the bytes are those of the wire."""
    monkeypatch.setitem(gpt.SIZES, "gpt", (1, 32, 2))
    file = tmp_path / "slow-links.jsonl"

    def ranks(rank, size):
        world = job_launch.World(rank, size, "torchrun", torch.device("cpu"))
        whole, trained = slow_links.trained.train, []

        def stops(world, command):
            if len(trained) == 3:
                raise KeyboardInterrupt
            trained.append(command)
            return whole(world, command)

        slow_links.trained.train = stops
        with pytest.raises(KeyboardInterrupt):
            slow_links.study(world, file, 4, (1e-3,), (0,))
        slow_links.trained.train = lambda world, command: trained.append(command) or whole(world, command)
        return slow_links.study(world, file, 4, (1e-3,), (0,)), len(trained)

    results = spawn_gloo(ranks, 4, timeout=120)
    found = slow_links.records.load(file)
    assert all(result == (found, len(slow_links.METHODS)) for result in results)
    sent = {r["method"]: r["bytes_sent_per_step"] for r in found[1:]}
    assert all(r["loss"] > 0 and r["step"] == 4 for r in found[1:])
    assert sent["dense adamw"] > 7 * sent["lowbit4 adamw"] > 7 * 7 * sent["muon k4"] > 0
    assert sent["muon k14"] == 0.0  # no block ended
