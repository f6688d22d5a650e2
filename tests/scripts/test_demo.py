"""scripts/demo, the README's first command, on a small model: all four jobs, the table, the figure."""

import sys

import pytest
from benchmarks.harness.records import load
from launch import ROOT, run
from training.demo import ENTRIES, main, rows

from commhooks.native import abi


@pytest.mark.mpi
@pytest.mark.slow
def test_the_demo_prints_its_table_and_draws_its_figure(tmp_path):
    figure = tmp_path / "drawn" / "demo.png"
    command = [str(ROOT / "scripts" / "demo"), "--model", "mlp", "--epochs", "1", "--ranks", "2"]
    command += [
        "--output",
        str(figure),
        "--keep",
        str(tmp_path / "logs"),
        "--json",
        str(tmp_path / "demo.jsonl"),
    ]
    done = run(command, timeout=240, env={"COMMHOOKS_PYTHON": sys.executable}, cwd=tmp_path)
    cells = [[cell.strip() for cell in line.split("|")] for line in done.stdout.splitlines() if "|" in line]
    table = {row[1]: row[2:-1] for row in cells[2:]}
    assert list(table) == [entry.name for entry in ENTRIES] and len(table) == 4, done.show()
    assert [table[name][0] for name in table] == ["1", "0.01", "0.01", "0.05"], done.show()
    sent = [int(row[4].replace(",", "")) for row in table.values()]
    assert sent[0] > 10 * max(sent[1:]) and min(sent) > 0, done.show()
    assert all(float(row[3].rstrip("%")) > 30.0 for row in table.values()), done.show()  # ten digits
    assert figure.read_bytes().startswith(b"\x89PNG") and figure.stat().st_size > 10_000
    assert len(list((tmp_path / "logs").glob("*.jsonl"))) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.jsonl", "drawn", "logs"]
    records = load(tmp_path / "demo.jsonl")
    assert [row[:2] for row in rows(records)] == [(name, table[name][0]) for name in table]
    assert [row[-2] for row in rows(records)] == [row[4] for row in table.values()]


def test_the_demo_refuses_to_measure_without_the_kernels(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(abi, "cpu", lambda: None)
    monkeypatch.setattr("training.demo.train", lambda *a: pytest.fail("trained"))
    with pytest.raises(SystemExit) as ended:
        main(["--keep", str(tmp_path / "logs")])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("scripts/demo: the native kernels are not in use")
    assert "--allow-reference" in said and not (tmp_path / "logs").exists()
