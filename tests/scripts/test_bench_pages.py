"""Records and pages: a page is what its records render, and a record is a primary measurement on one line."""

import json

import pytest
from benchmarks.harness import pages, records, table
from benchmarks.pages.pictures import PICTURES
from launch import ROOT

FOLDER = ROOT / "docs" / "performance"


@pytest.mark.parametrize("page", pages.PAGES)
def test_a_page_is_what_its_records_render(page):
    old, new = pages.rendered(page)
    assert old == new, f"{page} differs from its records: scripts/bench render"


def test_a_changed_number_is_seen(monkeypatch, capsys, tmp_path):
    text = "# A page\n<!-- rendered: one -->\n| 1 |\n<!-- end -->\nrest\n"
    (tmp_path / "page.md").write_text(text)
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    monkeypatch.setattr(pages, "PAGES", {"page.md": "a.module"})
    tables = type("Module", (), {"TABLES": {"one": lambda: ["| 2 |"]}})
    monkeypatch.setattr(pages.importlib, "import_module", lambda name: tables)
    options = type("Options", (), {"check": True, "pictures": False})
    assert pages.run(options) == 1 and (tmp_path / "page.md").read_text() == text
    said = capsys.readouterr().err
    assert "-| 1 |" in said and "+| 2 |" in said
    options.check = False
    assert pages.run(options) == 0 and (tmp_path / "page.md").read_text() == text.replace("| 1 |", "| 2 |")
    options.check = True
    assert pages.run(options) == 0


def test_a_table_without_a_place_and_a_place_without_a_table():
    text = "<!-- rendered: one -->\n<!-- end -->\n"
    assert pages.render(text, {"one": lambda: ["a", "b"]}) == "<!-- rendered: one -->\na\nb\n<!-- end -->\n"
    for wrong in ({}, {"two": list}, {"one": list, "two": list}):
        with pytest.raises(ValueError, match="the page has the tables"):
            pages.render(text, wrong)


def test_records_are_few_and_one_a_line():
    files = sorted(FOLDER.glob("*.json*"))
    assert sum(len(file.read_text().splitlines()) for file in files) < 3000
    for file in files:
        if file.suffix != ".jsonl":
            continue
        for record in records.load(file):
            assert "ratio" not in record and "baseline" not in record, (file.name, record)
            assert record["bench"]


def test_no_record_is_there_twice():
    for file in sorted(FOLDER.glob("*.jsonl")):
        lines = file.read_text().splitlines()
        if file.stem.startswith("kernels"):  # a hit rate is the same in many runs
            continue
        assert len(set(lines)) == len(lines), file.name


def test_save_and_load(tmp_path):
    file = tmp_path / "new" / "records.jsonl"
    kept = [{"bench": "a", "x": 1 / 3, "deep": [{"y": (2e-7 / 3, 1)}]}, {"bench": "b", "n": 123456789.0}]
    records.save(kept, file)
    assert records.load(file) == [
        {"bench": "a", "x": 0.333333, "deep": [{"y": [6.66667e-08, 1]}]},
        {"bench": "b", "n": 123456789.0},
    ]
    assert [entry.name for entry in file.parent.iterdir()] == ["records.jsonl"]
    records.save(kept[:1], file)
    assert len(records.load(file)) == 1


@pytest.mark.parametrize("line", ('{"bench": ', "[1, 2]"))
def test_a_line_that_is_no_record(line, tmp_path):
    file = tmp_path / "records.jsonl"
    file.write_text(json.dumps({"bench": "a"}) + "\n" + line + "\n")
    with pytest.raises(ValueError, match="records.jsonl:2"):
        records.load(file)


def test_one_record():
    found = [{"bench": "a", "n": 1}, {"bench": "a", "n": 2}, {"bench": records.LINK}]
    assert records.one(found, n=2) == found[1] and records.measured(found) == found[:2]
    for labels in ({"bench": "a"}, {"n": 3}):
        with pytest.raises(ValueError, match="one is wanted"):
            records.one(found, **labels)


@pytest.mark.parametrize(
    "value, shown",
    (
        (0.0004, "0.0004"),
        (0.024, "0.024"),
        (0.97, "0.97"),
        (1.238, "1.24"),
        (9.83, "9.8"),
        (57.4, "57"),
        (12449.7, "12,450"),
    ),
)
def test_numbers(value, shown):
    assert table.number(value) == shown


def test_tables():
    assert table.columns(("a", "bb"), [("ccc", "1"), ("d", "22")]) == "a    bb\nccc   1\nd    22"
    assert table.markdown(("a", "b"), [("c", "1")]) == ["| a | b |", "| --- | ---: |", "| c | 1 |"]


def test_every_picture_is_drawn_from_its_records(tmp_path):
    assert {file.name for file in PICTURES} == {file.name for file in FOLDER.glob("*.png")}
    for file, plot in PICTURES.items():
        plot(tmp_path / file.name)
        assert (tmp_path / file.name).stat().st_size > 1000
