"""Time to dense AdamW's loss: from curves of the study and the time of a step."""

import pytest
from benchmarks.network.training import METHODS
from benchmarks.pages import time_to_loss as page
from studies import slow_links

ABOUT = {"bench": "study", "steps": 120, "rates": [0.003], "seeds": [0, 1]}


def run(method, seed, curve, lr=0.003):
    labels = {"bench": "run", "method": method, "ranks": 4, "lr": lr, "seed": seed, "step": 120}
    return {**labels, "loss": curve[-1], "bytes_sent_per_step": 1.0, "curve": curve}


def step(method, network, seconds):
    labels = {"bench": "training", "ranks": 4, "network": network, "method": method}
    return {**labels, "step_s": seconds, "steps": 8, "interface_bytes": 1e6 * seconds}


@pytest.fixture
def files(monkeypatch):
    """Two seeds; at steps 56, 112 and 120. A rate that is not the best does not count."""
    study = [ABOUT, run("dense adamw", 0, [9.0, 9.0, 9.0], lr=0.001)]
    for seed in (0, 1):
        study += [run("dense adamw", seed, [3.0, 2.5, 2.0]), run("muon k4", seed, [2.0 + seed, 1.0, 0.9])]
        study += [run("muon k14", seed, [3.0, 2.5, 2.25]), run("lowbit4 adamw", seed, [3.0, 2.0, 1.9])]
    times = [
        step(name, network, 8.0 if METHODS[name].block == 1 else 0.5)
        for network in ("10mbit", "100mbit")
        for name in METHODS
    ]
    found = {"slow-links": study, "low-bit": times}
    monkeypatch.setattr(page, "load", found.__getitem__)
    return found


def test_a_loss_is_reached_between_two_points():
    curve = [(10, 4.0), (20, 2.0), (30, 2.5), (40, 1.0)]
    assert [page.steps_to(curve, loss) for loss in (5.0, 4.0, 3.0, 2.0, 1.75, 0.5)] == [
        10,
        10,
        15,
        20,
        35,
        None,
    ]


def test_steps_are_the_median_over_seeds_and_hooks_train_as_dense(files):
    known = page.curves(files["slow-links"])
    assert known["dense adamw"][0] == [(slow_links.CURVE_EVERY, 3.0), (112, 2.5), (120, 2.0)]
    assert page.steps_to_dense(known, "muon k4") == (56 + 84) / 2
    assert page.steps_to_dense(known, "fp16") == page.steps_to_dense(known, "dense adamw") == 120
    assert page.steps_to_dense(known, "muon k14") is None


def test_the_table_and_the_aims_follow(files):
    table = page.training()
    assert len(table) == 2 + 2 * len(METHODS)
    muon = next(
        line for line in table if line.startswith("| Muon, 1 bit every 4") and "| 10 Mbit/s |" in line
    )
    assert muon.endswith("| 70 | 35 | 27 | 27 | 27 |")
    assert next(line for line in table if line.startswith("| Muon, 1 bit every 14")).endswith(
        "| never |  |  |  |  |"
    )
    assert [(row[2], row[3]) for row in page.aims()] == [("27", "yes")] * 4
    for record in files["low-bit"]:
        record["step_s"] = 1.0
    assert [row[3] for row in page.aims()] == ["no"] * 4


def test_without_records_nothing_is_said(files):
    del files["low-bit"][:]
    assert len(page.training()) == 2
    assert [row[2:] for row in page.aims()] == [("", "not measured")] * 4


def test_the_picture_is_drawn(files, tmp_path):
    page.plot(tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 5000
