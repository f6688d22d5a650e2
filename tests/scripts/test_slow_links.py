"""scripts/accuracy --slow-links: its commands, the order of its runs, its choice of rates, and how it goes on."""

import pytest
from benchmarks.pages import slow_links as page
from interrupted_study import run_twice
from studies import slow_links
from training import gpt, options


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


ABOUT = {"bench": "study", "steps": 1204, "rates": [0.003, 0.0015, 0.006], "seeds": [0, 1, 2]}


def whole(method, losses, sent):
    """All five runs of a method: best at 0.006, where the seeds have these losses."""
    found = [record(method, lr, 0, 9.0) for lr in (0.003, 0.0015)]
    found += [record(method, 0.006, seed, loss) for seed, loss in enumerate(losses)]
    return [run | {"bytes_sent_per_step": sent} for run in found]


@pytest.fixture
def records(monkeypatch):
    """Two methods that are whole, one that diverged, and one run of another."""
    found = [ABOUT, *whole("dense adamw", (1.0, 1.2, 1.1), 600.0), *whole("muon k4", (1.0, 1.1, 1.05), 5.0)]
    found += [*whole("lowbit4 adamw", (1.0, None, 1.1), 76.0), record("muon k14", 0.003, 0, 1.2)]
    found[-1]["bytes_sent_per_step"] = 1.4
    monkeypatch.setattr(page, "load", lambda name: found)
    return found


def test_a_row_is_the_median_at_the_best_rate(records):
    rows = {(row.method, row.ranks): row for row in slow_links.rows(records)}
    assert len(rows) == 7
    muon = rows["muon k4", 4]
    assert (muon.lr, muon.losses, muon.loss) == (0.006, [1.0, 1.1, 1.05], 1.05)
    assert (muon.runs, muon.wanted, rows["muon k4", 8].wanted) == (5, 5, 3)
    assert rows["lowbit4 adamw", 4].loss is None and rows["dense muon", 4].runs == 0


def test_the_page_says_what_is_missing_what_is_met_and_what_is_not(records):
    table = page.methods()
    assert len(table) == 2 + 4
    assert (
        "| Muon, 1 bit every 4 steps, outer Nesterov 0.5 | 5 of 5 | 0.006 | 1.050 | -4.5% |  | 120 |" in table
    )
    assert "| AdamW, gradients in 4 bits | 5 of 5 | 0.006 | diverges |  |  | 7.9 |" in table
    said = " ".join(page.state())
    assert said.startswith("Runs recorded: 16 of 33.") and "dense Muon" in said
    assert "Muon, 1 bit every 4 steps, outer Nesterov 0.5, 8 ranks" in said
    met = [line.split(" | ")[-1].rstrip(" |") for line in page.aims()[2:]]
    assert met == ["yes", "not all runs are there", "not all runs are there", "no", "not all runs are there"]
    worse = [run | {"loss": 1.09} if run.get("method") == "muon k4" else run for run in records]
    records[:] = worse
    assert page.aims()[2].endswith("| -0.9% at 120 | no |")


def test_a_short_study_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    """Two steps of a tiny GPT by every method; the bytes are those of the wire."""
    monkeypatch.setitem(gpt.SIZES, "gpt", (1, 32, 2))
    file = tmp_path / "slow-links.jsonl"

    found, ran, other = run_twice(
        lambda world: slow_links.study(world, file, 4, (1e-3,), (0,)), 4, timeout=120
    )
    assert found == other == slow_links.records.load(file)
    assert len(ran) == len(found) - 1 == len(slow_links.METHODS)
    sent = {r["method"]: r["bytes_sent_per_step"] for r in found[1:]}
    assert all(r["loss"] > 0 and r["step"] == 4 for r in found[1:])
    assert sent["dense adamw"] > 7 * sent["lowbit4 adamw"] > 7 * 7 * sent["muon k4"] > 0
    assert sent["muon k14"] == 0.0  # no block ended
