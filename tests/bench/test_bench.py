"""``commhooks bench`` on tiny models: every scheme is checked and measured, what is wrong is said, nothing hangs."""

import argparse
import json
import re

import pytest
import torch
import torch.distributed as dist
from launch import mpiexec, spawn_gloo
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from commhooks.bench import child, command, measure
from commhooks.bench import figure as style
from commhooks.bench.measure import FOREIGN, OURS, Row, attach, check
from commhooks.bench.models import GPT, ResNet50, Source, Workload, make_workload
from commhooks.native import abi

TINY = Source(numel=2500)


def arguments(*text):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(text)


def own_model():
    model = torch.nn.Linear(3, 2)
    return model, lambda net: net(torch.ones(4, 3)).square().mean()


def wrong_hook(factor):
    def hook(state, bucket):
        buffer = bucket.buffer().mul_(factor)
        if factor != 1:
            dist.all_reduce(buffer)
        done = Future()
        done.set_result(buffer)
        return done

    return hook


def measured(rank, size):
    """The report on rank 0, what the check says of two wrong averages, and what is said of files."""
    asked = ["--numel", "2500", "--seconds", "60", "--density", "0.1", "--schemes", "dense", "fp16", *OURS]
    report = command.run(arguments(*asked))
    late = command.run(arguments("--numel", "2500", "--seconds", "1e-9", "--schemes", "dense"))
    found = []
    for factor in (1, 2):
        workload = make_workload(TINY, rank)
        ddp = DistributedDataParallel(workload.model)
        ddp.register_comm_hook(None, wrong_hook(factor))
        found.append(check("dense", ddp, None, workload))
    own = make_workload(Source(function="test_bench:own_model"), rank)
    ddp, state = attach("topk", own, 0.5)
    found.append(check("topk", ddp, state, own))
    state.close()
    nowhere = ["--json", "/nowhere/a.json", "--plot", "/nowhere/b.png"] if rank == 0 else []
    with pytest.raises(ValueError, match="--json /nowhere/a.json: .*; --plot /nowhere/b.png: its folder"):
        command.run(arguments("--numel", "2500", *nowhere))  # all ranks learn what rank 0 could not write
    return report, late, found


def without_kernels(rank, size):
    """What the ranks are told when rank 1 has no kernels, and the report when they measure all the same."""
    if rank == 1:
        abi.cpu = lambda: None
    with pytest.raises(ValueError) as refused:
        command.run(arguments("--numel", "2500", "--schemes", "dense"))
    asked = ["--numel", "2500", "--seconds", "1e-9", "--schemes", "dense", "--allow-reference"]
    return str(refused.value), command.run(arguments(*asked))


def test_without_native_kernels_bench_refuses_unless_told():
    (first, report), (second, _) = spawn_gloo(without_kernels, 2)
    assert "not in use on rank 1" in first and second.startswith("the native kernels are not in use (")
    assert "--allow-reference" in first and "--allow-reference" in second
    assert "Rank 1 has no native kernels" in command.text(report)


def test_every_scheme_is_checked_and_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "MOST_STEPS", 5)
    (report, late, found), (other, _, _) = spawn_gloo(measured, 2)
    assert other is None
    assert found[0] == "the ranks hold different averages"
    assert found[1].startswith("wrong: off by") and found[2] == ""
    assert [row.scheme for row in report.rows] == ["dense", "fp16", *OURS]
    assert not [row.note for row in report.rows if row.note]
    assert report.numel == 2500 and report.world_size == 2 and len(report.hosts) == 1
    sent = {row.scheme: row.bytes_sent for row in report.rows}
    assert sent["dense"] == 10_000 and sent["fp16"] == 5_000
    assert sent["topk"] == sent["gtopk"] == 8 * 250 + 16
    for row in report.rows:
        assert row.steps >= 3 and row.exposed_s == pytest.approx(row.step_s - report.alone_s)
    assert late.rows[0].note == "not run: --seconds 1e-09 were over, give more" in command.text(late)
    text = command.text(report)
    assert "2,016" in text and "exposed: step - step inside no_sync" in text and "not a network" in text
    files = [str(tmp_path / name) for name in ("report.json", "report.png")]
    pytest.importorskip("matplotlib")
    command.save(report, *files)
    assert json.loads((tmp_path / "report.json").read_text())["rows"][2]["bytes_sent"] == sent["topk"]
    assert (tmp_path / "report.png").stat().st_size > 1000


def test_a_loss_that_gives_another_gradient_each_time_is_refused_before_anything_is_measured():
    generator = torch.Generator().manual_seed(0)

    def job(rank, size):
        model = torch.nn.Sequential(torch.nn.Linear(8, 2), torch.nn.Dropout())
        ddp = DistributedDataParallel(model)
        measure.check_repeats(ddp, Workload("mine", model, lambda net: net(torch.randn(4, 8)).sum()))
        own = Workload("mine", model, lambda net: net(torch.randn(4, 8, generator=generator)).sum())
        fixed = Workload("mine", model, lambda net: net(torch.ones(4, 8)).sum())
        with pytest.raises(ValueError) as refused:
            measure.check_repeats(ddp, own if rank == 1 else fixed)  # all ranks learn of it
        return str(refused.value)

    for said in spawn_gloo(job, 2):
        assert said.startswith("mine gives another gradient each time") and "draw the batch once" in said


def test_a_step_that_was_faster_with_communication_is_said():
    """Another program ran meanwhile: the figures stand there, and the advice to measure again."""
    rows = [
        Row("dense", 0.4).beside(0.5),
        Row("topk", 0.6).beside(0.5),
        Row("gtopk", note="failed").beside(0.5),
    ]
    assert [row.exposed_s for row in rows] == [pytest.approx(-0.1), pytest.approx(0.1), None]
    report = command.Report("toy", 10, 2, ["a"], 0.01, 0.5, rows)
    assert "the machine is busy. Measure again" in command.text(report)
    report.rows[0] = Row("dense", 0.7).beside(0.5)
    assert "busy" not in command.text(report)


def test_the_picture_has_the_colours_of_all_others(tmp_path):
    """Grey is the step alone, and what communication adds has the scheme's colour."""
    colors = pytest.importorskip("matplotlib.colors")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    schemes = [*FOREIGN, *OURS]
    rows = [Row(scheme, 0.5, 0.3, None, 3) for scheme in schemes] + [Row("powersgd", note="failed")]
    report = command.Report("toy", 10, 2, ["a"], 0.01, 0.2, rows)
    command.save(report, None, str(tmp_path / "report.png"))
    drawn = pyplot.imread(tmp_path / "report.png")
    solid = drawn[drawn[..., 3] == 1][:, :3]  # the background is transparent
    for name in ("none", *schemes):
        distance = abs(solid - colors.to_rgb(style.color(name))).max(axis=1)
        assert (distance < 0.01).sum() > 1000, name


def test_a_child_that_hangs_is_ended():
    task = child.Task(0, 2, "127.0.0.1", 1, 1.0, TINY)
    assert child.measure(task, 0.2) is None


@pytest.mark.mpi
def test_under_mpiexec_and_powersgd_in_a_child():
    options = ["bench", "--numel", "2500", "--seconds", "60", "--schemes", "powersgd", "topk"]
    done = mpiexec("from commhooks.__main__ import program\nprogram()\n", 2, timeout=120, args=options)
    assert "2,500 parameters, 2 ranks" in done.stdout, done.show()
    assert re.findall(r"^(powersgd|topk) +[0-9.]+ ", done.stdout, re.M) == ["powersgd", "topk"], done.show()


def test_the_models_are_what_they_are_called():
    assert sum(p.numel() for p in ResNet50().parameters()) == 25_557_032
    assert 9.5e6 < sum(p.numel() for p in GPT().parameters()) < 10.5e6
    for model in ("resnet50", "gpt-10m"):
        workload = make_workload(Source(model=model), 0)
        with torch.no_grad():
            assert workload.loss(workload.model).isfinite()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--density", "0"], r"--density must be in \(0, 1\], got 0"),
        (["--seconds", "0"], "--seconds must be positive, got 0"),
        (["--numel", "nan"], "--numel must be from 1 to 1e10, got nan"),
        ([], "torchrun --nproc-per-node 4 -m commhooks bench"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        command.run(arguments(*options))


@pytest.mark.parametrize("name", ["nowhere", "nowhere:f", "os:getcwd"])
def test_a_function_that_makes_no_model(name):
    with pytest.raises(ValueError, match=f"--module.*{name}"):
        make_workload(Source(function=name), 0)
