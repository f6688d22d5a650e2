"""The pages of docs/results are what their records render."""

import json

import pytest
from launch import ROOT
from studies import accuracy, accuracy_horovod

RESULTS = ROOT / "docs" / "results"


@pytest.mark.parametrize("study", (accuracy, accuracy_horovod), ids=("accuracy", "horovod"))
def test_a_study_page_is_what_its_records_render(study):
    name = "horovod" if study is accuracy_horovod else "accuracy"
    assert study.rendered(RESULTS / f"{name}.jsonl") == (RESULTS / f"{name}.md").read_text()


def test_runs_are_saved_one_a_line(tmp_path):
    file = tmp_path / "study.jsonl"
    accuracy.save(file, {"bench": accuracy.STUDY, "ranks": 4}, [{"loss": float("nan"), "bytes": 1616604.0}])
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"bench": "study", "ranks": 4},
        {"bench": "run", "loss": None, "bytes": 1616604.0},
    ]
    about, runs = accuracy.saved(file)
    assert about["ranks"] == 4 and len(runs) == 1
