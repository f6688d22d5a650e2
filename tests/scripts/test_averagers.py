"""scripts/accuracy --averagers: its commands, the order of its runs, its choice of rates, and how it goes on."""

import pytest
from interrupted_study import run_twice
from studies import averagers, recipes, trained
from studies.averagers import Arm
from training import options

CHOICE = trained.CHOICE_SEED


def test_every_command_of_the_study_is_one_of_train_py():
    made = list(averagers.arms())
    assert len(made) == len(set(made)) == 9 and made[0] == Arm("dense", 1)
    assert [arm.period for arm in made[1:]] == [10] * 4 + [30] * 4
    small = options.parse([str(part) for part in recipes.NETWORKS["gpt"].given])
    kinds = {"dense": "none", "Local SGD": "local", "M-AVG": "block"}
    for arm in made:
        parsed = options.parse(averagers.command(arm, 0.002, 3))
        assert (parsed.lr, parsed.seed, parsed.steps) == (0.002, 3, averagers.STEPS)
        assert (parsed.model, parsed.optimizer, parsed.weight_decay) == ("gpt", "adamw", 0.1)
        assert parsed.batch_size == small.batch_size and parsed.text_size == small.text_size == 400_000
        assert parsed.averaging == kinds.get(arm.averager, "diloco")
        assert arm.averager == "dense" or parsed.period == arm.period
        assert parsed.steps % arm.period == 0
        assert (parsed.scheme == "topk") == (arm.averager == "DiLoCo, top-k")
        if arm.averager == "DiLoCo":
            assert (parsed.outer_lr, parsed.mu) == (0.7, 0.9)


def record(arm, lr, seed, loss, sent=10.0):
    figures = {"loss": loss, "bytes_sent_per_step": sent}
    return {"bench": "run", **arm._asdict(), "lr": lr, "seed": seed, **figures}


def test_every_arm_is_judged_before_a_rate_beyond_is_tried():
    done, order = [], []
    edge, best = Arm("DiLoCo", 10), {Arm("DiLoCo", 10): 0.4}
    for labels in averagers.left(done, (1.0, 2.0, 4.0), (0, 1)):
        arm = Arm(labels["averager"], labels["period"])
        order.append((arm, labels["lr"], labels["seed"]))
        done.append({**labels, "bench": "run", "loss": abs(labels["lr"] - best.get(arm, 2.0))})
    rates = [(1.0, CHOICE), (2.0, CHOICE), (4.0, CHOICE)]
    for number, arm in enumerate(averagers.arms()):
        judged = [(1.0 if arm == edge else 2.0, seed) for seed in (0, 1)]
        assert order[5 * number : 5 * number + 5] == [(arm, *run) for run in (*rates, *judged)]
    beyond = [(0.5, CHOICE), (0.25, CHOICE), (0.5, 0), (0.5, 1)]
    assert order[45:] == [(edge, *run) for run in beyond]
    assert list(averagers.left(done, (1.0, 2.0, 4.0), (0, 1))) == []


def test_the_rate_is_the_best_one_on_the_data_of_the_choice():
    arm = Arm("M-AVG", 30)
    done = [record(arm, lr, CHOICE, loss) for lr, loss in ((1.0, 2.0), (2.0, 1.0), (4.0, None))]
    done.append(record(arm, 1.0, 0, 0.5))  # the verdict's data do not count
    assert trained.best_rate_of(arm, done) == 2.0


def test_a_row_is_at_the_best_rate_at_which_all_seeds_ran():
    dense, arm, late = Arm("dense", 1), Arm("M-AVG", 10), Arm("M-AVG", 30)
    found = [
        {"bench": "study", "ranks": 2, "steps": 300, "rates": [1.0, 2.0], "seeds": [0, 1]},
        *(record(dense, lr, CHOICE, loss, 60.0) for lr, loss in ((1.0, 9.0), (2.0, 3.0), (4.0, 3.5))),
        *(record(dense, 2.0, seed, loss, 60.0) for seed, loss in ((0, 1.0), (1, 3.0))),
        *(record(arm, lr, CHOICE, loss) for lr, loss in ((1.0, 9.5), (2.0, 9.0), (4.0, 8.0))),
        *(record(arm, 2.0, seed, loss) for seed, loss in ((1, 2.2), (0, 2.0))),
        record(arm, 4.0, 0, 0.1),  # seed 1 is missing
        record(late, 1.0, CHOICE, 1.0),
    ]
    first, second = averagers.rows(found)
    assert first == averagers.Row(dense, 2.0, [1.0, 3.0], 0.0, 60.0, False)
    assert second[:3] == (arm, 2.0, [2.0, 2.2]) and second.above == pytest.approx(0.05)
    assert averagers.rows(found[:3]) == []
    found.append(record(arm, 4.0, 1, None))
    assert averagers.rows(found)[1][:4] == (arm, 4.0, [0.1, None], None)
    assert averagers.rows(found)[1].at_edge


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The quick study, interrupted after its third run and started again."""
    file = tmp_path_factory.mktemp("study") / "averagers.jsonl"

    found, ran, other = run_twice(
        lambda world: averagers.study(world, file, (0.003,), (0,), True), 2, timeout=240
    )
    return file, found, ran, other


def test_the_quick_study_goes_on_where_it_was_stopped(quick):
    file, found, ran, other = quick
    assert found == other == averagers.records.load(file)
    assert len(ran) == len(found) - 1 == 2 * 9  # none twice
    assert all(run["loss"] > 0 and run["step"] == 30 for run in found[1:])
    sent = {row.arm: row.bytes_sent_per_step for row in averagers.rows(found)}
    # a synchronisation takes the bytes of an all-reduce, a header and a vote
    assert sent[Arm("dense", 1)] / 10 < sent[Arm("DiLoCo", 10)] < sent[Arm("dense", 1)] / 6
    assert sent[Arm("M-AVG", 30)] == pytest.approx(sent[Arm("M-AVG", 10)] / 3)
    assert sent[Arm("DiLoCo, top-k", 30)] < sent[Arm("DiLoCo", 30)] / 3
    text = averagers.page(found)
    assert "| DiLoCo, top-k | 30 | 0.003 |" in text and "Not judged yet" not in text


def judged(arm, losses, lr=0.003, sent=10.0):
    """All runs of an arm that is best at a rate, where the seeds have these losses."""
    choice = [record(arm, tried, CHOICE, 1.0 if tried == lr else 2.0) for tried in averagers.RATES]
    return [*choice, *(record(arm, lr, seed, loss, sent) for seed, loss in enumerate(losses))]


def test_the_page_compares_with_dense_and_says_what_is_missing(tmp_path):
    about = {"bench": "study", "ranks": 4, "steps": 300, "rates": list(averagers.RATES), "seeds": [0, 1]}
    found = [about, *judged(Arm("dense", 1), (1.0, 2.0), sent=6000.0)]
    found += judged(Arm("Local SGD", 10), (1.01, 2.02), lr=0.006, sent=600.0)
    found += judged(Arm("M-AVG", 10), (1.0, None), sent=600.0)
    found += judged(Arm("DiLoCo", 10), (1.4, 2.2), sent=600.0)
    found += judged(Arm("DiLoCo, top-k", 10), (5.0, 5.1), sent=120.0)
    text = " ".join(averagers.page([*found, record(Arm("Local SGD", 30), 0.003, CHOICE, 1.0)]).split())
    assert "| Local SGD | 10 | 0.006 | 1.515 ± 0.714 | +1.0% | 600 | 10.0 |" in text
    assert "| M-AVG | 10 | 0.003 | diverges | - |" in text
    assert "Runs recorded: 26 of 45. Not judged yet: Local SGD at H = 30; M-AVG at H = 30; DiLoCo at" in text
    assert "Within 2% of dense's loss: Local SGD at H = 10. Above by less than the seeds differ" in text
    assert "(one standard deviation): DiLoCo at H = 10. The least loss at H = 10: Local SGD, +1.0%." in text
    assert (
        "rate tried, so perhaps better beyond: Local SGD at H = 10." in text
        and "least loss at H = 30" not in text
    )
    averagers.write(found, tmp_path)
    assert (tmp_path / "averagers.md").read_text() == averagers.page(found)
    assert (tmp_path / "averagers.png").stat().st_size > 1000


def test_a_study_without_a_judged_arm_has_a_page_without_a_picture(tmp_path):
    about = {"bench": "study", "ranks": 4, "steps": 300, "rates": [1.0], "seeds": [0, 1]}
    averagers.write([about, record(Arm("dense", 1), 1.0, CHOICE, 1.0)], tmp_path)
    text = (tmp_path / "averagers.md").read_text()
    assert "Runs recorded: 1 of 27. Not judged yet: dense; Local SGD at H = 10;" in text and "![" not in text
    assert not (tmp_path / "averagers.png").exists()
