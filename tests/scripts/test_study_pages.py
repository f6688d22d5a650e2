"""The pages of docs/results are what their records render."""

import json

import pytest
import torch
from benchmarks.harness import records
from launch import ROOT
from ranks import run_steps
from studies import accuracy, accuracy_horovod, averagers, recipes
from studies.papers import page
from studies.papers.judged import JUDGED
from studies.papers.problems import Quadratic
from studies.papers.simulate import SparseSetup, run_sparse

from commhooks import ErrorFeedback

RESULTS = ROOT / "docs" / "results"


@pytest.mark.parametrize("study", (accuracy, accuracy_horovod), ids=("accuracy", "horovod"))
def test_a_study_page_is_what_its_records_render(study):
    name = "horovod" if study is accuracy_horovod else "accuracy"
    assert study.rendered(RESULTS / f"{name}.jsonl") == (RESULTS / f"{name}.md").read_text()


def test_the_page_of_recipes_is_what_its_records_render():
    assert recipes.page(records.load(RESULTS / "recipes.jsonl")) == (RESULTS / "recipes.md").read_text()


def test_the_page_of_averagers_is_what_its_records_render():
    """Until the study has run there is neither page nor records nor picture."""
    files = [RESULTS / f"averagers.{ending}" for ending in ("jsonl", "md", "png")]
    kept = [file.exists() for file in files]
    assert kept[0] == kept[1] and (kept[0] or not kept[2])
    if kept[0]:
        found = records.load(files[0])
        assert averagers.page(found) == files[1].read_text()
        assert kept[2] == bool(averagers.rows(found))


def test_runs_are_saved_one_a_line(tmp_path):
    file = tmp_path / "study.jsonl"
    accuracy.save(file, {"bench": accuracy.STUDY, "ranks": 4}, [{"loss": float("nan"), "bytes": 1616604.0}])
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"bench": "study", "ranks": 4},
        {"bench": "run", "loss": None, "bytes": 1616604.0},
    ]
    about, runs = accuracy.saved(file)
    assert about["ranks"] == 4 and len(runs) == 1


def test_the_page_of_claims_is_what_its_records_render():
    folder = RESULTS / "reproduce"
    claims = json.loads((folder / "claims.json").read_text())
    text = (folder / "README.md").read_text()
    assert page.render(claims) == text
    assert set(JUDGED) <= set(claims)
    unbroken = " ".join(text.split())
    assert all(f" ({mark}) |" in text and sentence in unbroken for mark, sentence in JUDGED.values())


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("masking", [False, True])
def test_the_simulation_of_m_dsgd_is_the_library(momentum, masking):
    """The page says so. Both get the simulation's gradients; one computes in float64, the other in float32."""
    workers, keep, rate = 4, 3, 0.05
    setup = SparseSetup(
        Quadratic(),
        workers,
        25,
        lambda t: rate,
        keep,
        momentum=momentum,
        factor_masking=masking and momentum > 0,
    )
    states = [(w.clone(), u.clone(), g.clone()) for _, w, u, g in run_sparse(setup)]
    gradients = [[g[0, p].float() for p in range(workers)] for _, _, g in states[1:]]
    memory = lambda: ErrorFeedback(momentum=momentum, factor_masking=setup.factor_masking)  # noqa: E731
    seen = run_steps(workers, "union", keep / setup.problem.numel, gradients, memory=memory, average=True)
    for (before, _, _), (after, u, _), ranks in zip(states, states[1:], seen):
        update = (before - after)[0] / rate
        torch.testing.assert_close(ranks[0].output.double(), update, rtol=1e-4, atol=1e-4)
        for p, rank in enumerate(ranks):
            torch.testing.assert_close(rank.residual.double(), u[0, p], rtol=1e-4, atol=1e-4)
