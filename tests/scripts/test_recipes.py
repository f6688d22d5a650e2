"""scripts/accuracy --recipes: its runs, its choice of rates, how it goes on, and what it renders."""

import pytest
import torch
from interrupted_study import run_twice
from studies import recipes, trained
from training import options, tasks


def test_every_command_of_the_study_is_one_of_train_py():
    made = list(recipes.arms(list(recipes.NETWORKS)))
    assert len(made) == len(set(made)) > 40
    for arm in made:
        parsed = options.parse(recipes.command(arm, 0.1, 3))
        assert parsed.seed == 3 and parsed.lr == 0.1
        assert (parsed.scheme == "dense") == (arm.variant in (recipes.DENSE, recipes.CLIPPED))
        if arm.variant == recipes.MASKED:
            assert parsed.factor_masking and parsed.momentum_in == "memory" and parsed.warmup > 0
    # on every network each optimizer has its dense baseline first
    first = {}
    for arm in made:
        first.setdefault((arm.network, arm.optimizer), arm.variant)
    assert set(first.values()) == {recipes.DENSE}


def test_no_warm_up_is_as_long_as_its_run():
    """An epoch of the GPT's text has more steps than its run: nothing was compressed in it."""
    for name, network in recipes.NETWORKS.items():
        arm = next(a for a in recipes.arms([name]) if recipes.command(a, 0.1, 0).count(network.unit))
        parsed = options.parse(recipes.command(arm, 0.1, 0))
        if parsed.steps is None:
            assert 3 * parsed.warmup <= parsed.epochs, name
        else:
            assert parsed.warmup == 0 and 0 < 3 * parsed.warmup_steps <= parsed.steps, name


def record(arm, lr, seed, loss):
    return {
        "bench": "run",
        **arm._asdict(),
        "lr": lr,
        "seed": seed,
        "loss": loss,
        "accuracy": 0.5,
        "bytes_sent_per_step": 10.0,
    }


def test_the_rate_is_the_best_one_on_the_data_of_the_choice():
    arm = recipes.Arm("quick", "sgd", recipes.DENSE, 1.0)
    done = [record(arm, lr, trained.CHOICE_SEED, loss) for lr, loss in ((0.1, 2.0), (0.2, 1.0), (0.4, None))]
    done.append(record(arm, 0.1, 0, 0.5))  # the verdict's data do not count
    assert trained.best_rate_of(arm, done) == 0.2


def test_the_page_compares_with_dense_and_says_what_diverges():
    dense, sparse = (
        recipes.Arm("quick", "sgd", v, d) for v, d in ((recipes.DENSE, 1.0), (recipes.MASKED, 0.01))
    )
    wild = recipes.Arm("quick", "sgd", "no error feedback", 0.01)
    late = recipes.Arm("quick", "sgd", "no error feedback", 0.001)
    near = recipes.Arm("quick", "sgd", recipes.UNMASKED, 0.01)
    clipped = recipes.Arm("quick", "sgd", recipes.CLIPPED, 1.0)
    both = recipes.Arm("quick", "sgd", recipes.UNMASKED_CLIPPED, 0.01)
    found = [
        {"bench": "study", "ranks": 2, "rates": [1.0], "seeds": [0, 1]},
        *(record(dense, 0.1, seed, loss) for seed, loss in ((trained.CHOICE_SEED, 9.0), (0, 1.0), (1, 2.0))),
        *(
            record(arm, lr, trained.CHOICE_SEED, loss)
            for arm in (sparse, near, wild, late, clipped, both)
            for lr, loss in ((0.2, 9.0), (0.1, 9.5))
        ),
        *(record(sparse, 0.2, seed, loss) for seed, loss in ((0, 1.01), (1, 2.02))),
        *(record(sparse, 0.1, seed, 0.0) for seed in (0, 1)),  # of a rate that was the best one for a while
        *(record(clipped, 0.2, seed, 0.5) for seed in (0, 1)),
        *(record(both, 0.2, seed, 0.52) for seed in (0, 1)),
        *(record(near, 0.2, seed, loss) for seed, loss in ((0, 1.2), (1, 2.2))),
        *(record(wild, 0.2, seed, loss) for seed, loss in ((0, 1.0), (1, None))),
        record(late, 0.2, 0, 1.0),
    ]
    text = recipes.page(found)
    assert "| masked, warm-up | 0.01 | 0.2 | 1.515 ± 0.714 | +1.0% | 50.00% |" in text
    assert "| dense, clipped | 1 | 0.2 | 0.500 ± 0.000 | -66.7% |" in text
    assert "| warm-up, clipped | 0.01 | 0.2 | 0.520 ± 0.000 | +4.0% |" in text  # of dense, clipped
    assert "diverges" in text and "0.001" not in text
    text = " ".join(text.split())
    assert "Within 2% of dense's loss: masked, warm-up at 0.01. Above by less than the seeds" in text
    assert "(one standard deviation): warm-up at 0.01." in text
    assert "against dense training that is clipped: +4.0%." in text


def test_an_arm_whose_best_rate_is_the_first_or_the_last_also_gets_the_next():
    arm, done, tried = recipes.Arm("quick", "sgd", recipes.DENSE, 1.0), [], []
    best = 0.4
    for labels in recipes.runs([arm], (0.5, 1.0, 2.0), (0,), done):
        done.append({**labels, "loss": abs(labels["lr"] - best)})
        tried.append((labels["lr"], labels["seed"]))
    choice = trained.CHOICE_SEED
    assert tried == [(0.05, choice), (0.1, choice), (0.2, choice), (0.4, choice), (0.8, choice), (0.4, 0)]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The quick study, interrupted after its third run and started again."""
    file = tmp_path_factory.mktemp("study") / "recipes.jsonl"

    found, ran, other = run_twice(
        lambda world: recipes.study(world, file, ["quick"], (1.0,), (0,)), 2, timeout=120
    )
    return file, found, ran, other


def test_the_quick_study_goes_on_where_it_was_stopped(quick):
    file, found, ran, other = quick
    assert found == other == recipes.records.load(file)
    assert len(ran) == len(found) - 1 == 2 * len(list(recipes.arms(["quick"])))  # none twice
    assert all(r["loss"] is None or r["loss"] > 0 for r in found[1:])
    text = recipes.page(found)
    assert "## quick, sgd" in text and "| dense " in text and "warm-up, clipped" in text


def test_choice_and_verdict_see_other_data():
    class Task(tasks.Text):
        def __init__(self):
            self.test = torch.arange(10)

    halves = []
    for second in (False, True):
        task = Task()
        trained.keep_half(task, second)
        halves.append(task.test.tolist())
    assert halves == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
