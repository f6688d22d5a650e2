"""scripts/train.py as a user starts it: both launchers, every scheme, logs, checkpoints, refusals."""

import json
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from launch import ROOT, mpiexec, mpiexec_path, run, spawn_gloo, torchrun
from test_data import write_cifar, write_ptb
from train import render
from training import checkpoint, loop, options, schedules, strategies
from training import launch as job_launch
from training.log import Log, read, table
from training.schedules import learning_rate

from commhooks.transports import NAMES

TRAIN = ROOT / "scripts" / "train.py"
MLP = ["--model", "mlp", "--hidden", "64", "--batch-size", "64", "--quiet"]


def parse(*arguments):
    return options.parse(list(map(str, arguments)))


def in_ranks(size, *runs):
    """Train once per list of options, one after the other in the same `size` forked ranks; summaries of rank 0."""

    def ranks(rank, size):
        world = job_launch.World(rank, size, "torchrun", torch.device("cpu"))
        return [loop.Run(parse(*run), world).train() for run in runs]

    return spawn_gloo(ranks, size, timeout=400)[0]


def newest(folder):
    """The content of the newest checkpoint: common part and the ranks' parts."""
    path = sorted(Path(folder).glob("step-*"))[-1]
    return [torch.load(file, weights_only=True) for file in sorted(path.iterdir())]


def assert_same(a, b, where=""):
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for number, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}/{number}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif not where.endswith(("step_time_s", "seconds")):
        assert a == b, where


def steps(path):
    """What a log says of the steps, but for the times; the norm is summed up in another order after a resume."""
    lines = [{k: v for k, v in record.items() if k != "step_time_s"} for record in read(path, "step")]
    for line in lines:
        line["residual_norm"] = round(line.get("residual_norm", 0.0), 10)
    return lines


COMMON = ["--epochs", 2, "--density", 0.05, "--seed", 3, "--log-every", 4, "--bucket-mb", 0.01]
RESUMED = {
    "dense": [*MLP, "--scheme", "dense", "--momentum", 0.9],
    "topk": [*MLP, "--scheme", "topk", "--momentum", 0.9, "--factor-masking", "--warmup", 1],
    "gtopk": [*MLP, "--scheme", "gtopk", "--delta-every", 3],
    "gtopk-tree": [*MLP, "--scheme", "gtopk-tree", "--momentum", 0.5],
    "randomk": [*MLP, "--scheme", "randomk"],
    "threshold": [*MLP, "--scheme", "threshold"],
    "batch-norm": ["--model", "resnet20", "--batch-size", 90, "--scheme", "gtopk", "--quiet"],
    "text": [
        "--task",
        "text",
        "--text-size",
        45_000,
        "--hidden",
        16,
        "--batch-size",
        24,
        "--quiet",
        "--scheme",
        "topk",
    ],
}


@pytest.mark.parametrize("size", [2, 3])
def test_a_resumed_run_ends_in_the_same_bits(tmp_path, size):
    chosen = RESUMED if size == 2 else {name: RESUMED[name] for name in ("dense", "topk", "gtopk")}
    runs = []
    for name, given in chosen.items():
        folder, log = tmp_path / name, tmp_path / f"{name}.jsonl"
        given = [*given, *COMMON]
        # stopped in mid-epoch, with several buckets, so that data position, layout and carry all matter
        runs.append([*given, "--checkpoint", folder / "whole", "--log-file", log])
        stopped = [*given, "--checkpoint", folder / "parts", "--log-file", f"{log}.parts"]
        runs.append([*stopped, "--stop-after", 5])
        runs.append([*stopped, "--resume"])
    summaries = in_ranks(size, *runs)
    for number, name in enumerate(chosen):
        whole, stopped, resumed = summaries[3 * number : 3 * number + 3]
        assert stopped["step"] == 5 and resumed["step"] == whole["step"] > 10
        for part_a, part_b in zip(newest(tmp_path / name / "whole"), newest(tmp_path / name / "parts")):
            assert_same(part_a, part_b, name)
        assert steps(tmp_path / f"{name}.jsonl") == steps(tmp_path / f"{name}.jsonl.parts")
        assert whole["test_accuracy"] == resumed["test_accuracy"]
        assert whole["bytes_sent_per_step"] == resumed["bytes_sent_per_step"]


def test_the_resume_test_can_fail(tmp_path, monkeypatch):
    """Without priming the bucket layout or without the residuals the bits differ: the test above would notice."""
    given = [*RESUMED["topk"], *COMMON, "--seed", 3]

    def forget(*args):
        return None

    def differs():
        runs = [[*given, "--checkpoint", tmp_path / "whole"]]
        in_ranks(2, *runs, [*given, "--checkpoint", tmp_path / "parts", "--stop-after", 5])
        in_ranks(2, [*given, "--checkpoint", tmp_path / "parts", "--resume"])
        try:
            for part_a, part_b in zip(newest(tmp_path / "whole"), newest(tmp_path / "parts")):
                assert_same(part_a, part_b)
        except AssertionError:
            return True
        return False

    monkeypatch.setattr(strategies.Sparse, "prime", forget)
    assert differs()
    monkeypatch.undo()
    monkeypatch.setattr(strategies.Sparse, "load_state_dict", forget)
    assert differs()


def test_resuming_with_other_options_names_them_and_another_world_size_keeps_the_mean_residual(tmp_path):
    given = [*RESUMED["topk"], *COMMON, "--checkpoint", tmp_path]
    in_ranks(4, [*given, "--stop-after", 5])
    before = [part["strategy"]["residual"] for part in newest(tmp_path)[1:]]

    def continue_with_two(rank, size):
        world = job_launch.World(rank, size, "torchrun", torch.device("cpu"))
        run = loop.Run(parse(*given, "--resume"), world)
        state = run.strategy.state_dict()
        with pytest.raises(ValueError, match=r"density: 0.05 in the checkpoint, 0.1 now"):
            loop.Run(parse(*given, "--resume", "--density", 0.1), world)
        return run.done, state["residual"]

    (done, first), (_, second) = spawn_gloo(continue_with_two, 2)
    assert done == 5
    for name in first:
        mean = sum(part[name] for part in before) / 4
        torch.testing.assert_close((first[name] + second[name]) / 2, mean)


def test_checkpoints_are_complete_and_only_two_are_kept(tmp_path):
    in_ranks(2, [*MLP, *COMMON, "--checkpoint", tmp_path, "--checkpoint-every", 5, "--stop-after", 17])
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-00000015", "step-00000017"]
    assert sorted(path.name for path in (tmp_path / names[1]).iterdir()) == [
        "common.pt",
        "rank0.pt",
        "rank1.pt",
    ]
    (tmp_path / ".step-00000025.part").mkdir()  # a writer that was killed
    world = job_launch.World(1, 2, "torchrun", torch.device("cpu"))
    common, parts = checkpoint.load(tmp_path, world)
    assert common["step"] == 17 and len(parts) == 1
    assert checkpoint.load(tmp_path / "nothing", world) is None


def test_the_log_says_what_happened_in_each_step_and_epoch(tmp_path):
    log = tmp_path / "run.jsonl"
    given = ["--epochs", 2, "--density", 0.05, "--log-file", log, "--delta-every", 4, "--batch-size", 32]
    (summary,) = in_ranks(4, [*MLP, *given, "--scheme", "gtopk", "--lr-schedule", "constant", "--lr", 0.2])
    start, *_, end = read(log)
    assert start["event"] == "start" and start["ranks"] == 4 and start["options"]["density"] == 0.05
    assert start["parameters"] == 64 * 64 + 64 + 64 * 64 + 64 + 64 * 10 + 10
    lines = read(log, "step")
    assert [line["step"] for line in lines] == list(range(1, 23))
    assert [line["epoch"] for line in lines] == [0] * 11 + [1] * 11
    assert lines[-1]["loss"] < lines[0]["loss"] and all(line["lr"] == 0.2 for line in lines)
    k = -(-start["parameters"] // 20)
    sent = {line["bytes_sent"] for line in lines}
    assert len(sent) == 1 and 2 * 8 * k <= sent.pop() <= 2 * 8 * k + 256  # two rounds and their headers
    assert [line["step"] for line in lines if "delta" in line] == [1, 5, 9, 13, 17, 21]
    epochs = read(log, "epoch")
    assert [line["epoch"] for line in epochs] == [1, 2] and epochs[-1]["test_accuracy"] == end[
        "test_accuracy"
    ]
    assert epochs[0]["train_loss"] == pytest.approx(sum(line["loss"] for line in lines[:11]) / 11)
    assert end["event"] == "end" and end["test_accuracy"] == summary["test_accuracy"] > 0.3


def test_a_resumed_log_forgets_what_came_after_the_checkpoint(tmp_path):
    path = tmp_path / "log"
    log = Log(str(path))
    log.write("start", ranks=1)
    for step in (1, 2, 3):
        log.write("step", step=step, delta=None)
    log.write("end", step=3)
    log.close()
    with path.open("a") as file:
        file.write('{"event": "st')
    log = Log(str(path), resume_step=2)
    log.write("step", step=3)
    log.close()
    assert [record.get("step") for record in read(path)] == [None, 1, 2, 3]
    assert "delta" not in read(path)[1]


def test_torchrun_trains_and_prints_a_summary(tmp_path):
    log = tmp_path / "run.jsonl"
    given = ["--scheme", "topk", "--epochs", "4", "--model", "mlp", "--lr", "0.2", "--density", "0.05"]
    done = torchrun(TRAIN, 2, args=[*given, "--log-file", log], timeout=100, cwd=tmp_path)
    assert "| scheme" in done.stdout and "| test accuracy" in done.stdout and "step 88/88" in done.stderr
    assert read(log, "start")[0]["launcher"] == "torchrun"
    assert read(log, "end")[0]["test_accuracy"] > 0.8


def test_the_summary_names_the_averaging_where_there_is_one():
    given = [*MLP, "--epochs", 1]
    averaged, plain = in_ranks(
        2, [*given, "--averaging", "local", "--period", 2], [*given, "--scheme", "dense"]
    )
    assert "| local, every 2 steps |" in render(averaged) and averaged["transport"] == "distributed"
    assert "averaging" not in render(plain) and plain["transport"] == "ddp"
    for words, expected in {
        "none": "none",
        "local --sync one-shot": "local, one-shot",
        "restarted --averaging-start 9": "restarted, every 8 steps, after step 9",
        "decentralized --topology complete": "decentralized, complete, every step",
        "stagewise --scheme topk": "stagewise",
    }.items():
        assert loop.averaging_of(parse("--averaging", *words.split())) == expected


@pytest.mark.mpi
@pytest.mark.parametrize("transport", ["mpi", "distributed"])
def test_mpiexec_trains_to_the_same_bits_as_torchrun_would(tmp_path, transport):
    log, other = tmp_path / "mpi.jsonl", tmp_path / "forked.jsonl"
    given = [*MLP, "--scheme", "gtopk", "--epochs", "1", "--bucket-mb", "0.01"]
    done = mpiexec(TRAIN, 3, args=[*given, "--transport", transport, "--log-file", log], timeout=100)
    assert done.stdout.count("| scheme") == 1
    in_ranks(3, [*given, "--log-file", other])
    assert read(log, "start")[0]["launcher"] == "mpi"
    assert steps(log) == steps(other)


@pytest.mark.mpi
def test_a_rank_that_fails_under_mpiexec_takes_the_job_down_even_without_m_mpi4py(tmp_path):
    program = textwrap.dedent("""
        import time
        from training import launch
        with launch.session() as world:
            assert world.size == 2 and world.launcher == "mpi"
            if world.rank == 1:
                raise ValueError("rank one has had enough")
            time.sleep(60)
    """)
    path = tmp_path / "program.py"
    path.write_text(program)
    done = run([str(mpiexec_path()), "-n", "2", sys.executable, str(path)], timeout=40, check=False)
    assert done.returncode != 0 and not done.timed_out
    assert "rank one has had enough" in done.stdout + done.stderr


@pytest.mark.mpi
def test_an_mpiexec_of_another_mpi_is_found_out(tmp_path):
    """A foreign launcher tells each rank that it is one of four, while the library finds itself alone."""
    command = [sys.executable, str(TRAIN), "--checkpoint", str(tmp_path)]
    done = run(command, env={"OMPI_COMM_WORLD_SIZE": "4"}, check=False, timeout=60)
    assert done.returncode != 0 and not done.timed_out and not list(tmp_path.iterdir())
    assert "started 4 ranks" in done.stderr and "sees 1" in done.stderr and "bin/mpiexec" in done.stderr


def test_published_formats_train_from_a_local_folder(tmp_path):
    write_cifar(tmp_path / "cifar", per_file=8)
    write_ptb(tmp_path / "ptb")
    image = [
        "--task",
        "cifar10",
        "--data",
        tmp_path / "cifar",
        "--epochs",
        1,
        "--batch-size",
        10,
        "--scheme",
        "topk",
    ]
    text = ["--task", "ptb", "--data", tmp_path / "ptb", "--epochs", 2, "--batch-size", 2, "--window", 10]
    image, text = in_ranks(
        2, [*image, "--quiet"], [*text, "--hidden", 16, "--scheme", "randomk", "--density", 0.1, "--quiet"]
    )
    assert image["step"] == 2 and 0 <= image["test_accuracy"] <= 1
    assert text["test_perplexity"] < 8


def test_no_gpu_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        parse("--device", "cuda")
    assert "error: --device cuda: torch sees no CUDA device" in capsys.readouterr().err
    with pytest.raises(ValueError, match="'cuda': torch sees no CUDA device"):
        job_launch._device("cuda", 0)


@pytest.mark.parametrize(
    ("averaging", "momentum"), [("none", 0.0), ("local", 0.0), ("restarted", 0.9), ("decentralized", 0.9)]
)
def test_the_algorithms_about_momentum_have_some_by_default(averaging, momentum):
    assert parse("--averaging", averaging).momentum == momentum
    assert parse("--averaging", averaging, "--momentum", 0).momentum == 0.0


@pytest.mark.parametrize(
    ("given", "in_memory", "in_optimizer", "rescales"),
    [
        (["--rescale-with-lr"], 0.5, 0.0, True),
        (["--momentum-in", "optimizer"], 0.0, 0.5, False),
        (["--no-error-feedback"], None, 0.5, False),
    ],
)
def test_momentum_is_where_it_is_asked_for(given, in_memory, in_optimizer, rescales):
    def ranks(rank, size):
        world = job_launch.World(rank, size, "torchrun", torch.device("cpu"))
        chosen = parse(*MLP, "--scheme", "topk", "--momentum", 0.5, *given)
        strategy = loop.strategy_of(torch.nn.Linear(3, 2), chosen, world, 5)
        memory, group = strategy.state.reducer.memory, strategy.optimizer.param_groups[0]
        strategy.close()
        follows = getattr(memory, "optimizer", None) is strategy.optimizer
        return getattr(memory, "momentum", None), group["momentum"], follows

    assert spawn_gloo(ranks, 1)[0] == (in_memory, in_optimizer, rescales)


def test_dense_and_local_steps_clip_the_whole_gradient():
    """One step of rate 1 without momentum moves the model by at most --clip-norm."""

    def ranks(rank, size):
        world = job_launch.World(rank, size, "torchrun", torch.device("cpu"))
        moved = []
        for given in (
            ["--scheme", "dense"],
            ["--averaging", "local"],
            ["--averaging", "local", "--scheme", "topk"],
        ):
            chosen = parse("--model", "mlp", *given, "--clip-norm", 0.01, "--lr", 1)
            model = torch.nn.Linear(3, 2)
            strategy = loop.strategy_of(model, chosen, world, 5)
            before = torch.cat([p.detach().flatten() for p in model.parameters()])
            strategy.step(lambda m: 100 * m(torch.ones(4, 3)).square().sum())
            after = torch.cat([p.detach().flatten() for p in model.parameters()])
            moved.append(float((after - before).norm()))
            strategy.close()
        return moved

    for moved in spawn_gloo(ranks, 2):
        assert moved == pytest.approx([0.01] * 3, rel=1e-3)


def test_learning_rates():
    def rates(*given, steps=range(12)):
        chosen = parse("--lr", 1, *given)
        return [round(learning_rate(chosen, step, 12, 3), 6) for step in steps]

    assert rates("--lr-schedule", "constant", "--lr-warmup", 4)[:6] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    cosine = rates("--lr-warmup", 4)
    assert cosine[4] == 1.0 and cosine[8] == 0.5 and 0 < cosine[11] < 0.05
    assert rates("--lr-schedule", "step", "--lr-every", 2, "--lr-gamma", 0.5) == [1.0] * 6 + [0.5] * 6
    falling = rates("--lr-schedule", "exponential", "--lr-gamma", 0.5)
    assert falling[::3] == [1.0, 0.5, 0.25, 0.125] and falling == sorted(falling, reverse=True)


def test_the_density_falls_over_epochs_or_steps_and_a_warm_up_as_long_as_the_run_is_told():
    def schedule(*given):
        return strategies.sparse_state(parse("--scheme", "topk", *given), 10).reducer.selector.schedule

    steps, epochs = schedule("--warmup-steps", 4), schedule("--warmup", 2)
    assert [steps.density(step) for step in (0, 4)] == [0.25, 0.01] and steps.density(2) == pytest.approx(
        0.05
    )
    assert [epochs.density(step) for step in (0, 9, 20)] == [0.25, 0.25, 0.01]

    def note(*given):
        return schedules.note_on_warmup(parse("--scheme", "topk", *given), 10)

    assert note("--steps", 10, "--warmup", 1) == (
        "train.py: the warm-up of the density takes 10 steps and the run 10: density 0.01 is never reached"
    )
    assert note("--epochs", 2, "--warmup-steps", 20) and not note("--epochs", 2, "--warmup-steps", 19)
    assert not note("--epochs", 1) and not schedules.note_on_warmup(
        parse("--scheme", "dense", "--epochs", 1, "--warmup", 1), 10
    )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scheme", strategies.SPARSE)
def test_without_error_feedback_nothing_is_remembered(scheme):
    plain = strategies.sparse_state(parse("--scheme", scheme, "--no-error-feedback"), 10)
    kept = strategies.sparse_state(parse("--scheme", scheme), 10)
    assert type(plain.reducer.memory).__name__ == "NoMemory"
    assert type(kept.reducer.memory).__name__ == "ErrorFeedback"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--density", "0"], "--density 0.0 is outside (0, 1]"),
        (["--momentum", "1"], "--momentum 1.0 is outside [0, 1)"),
        (["--scheme", "powersgd"], "invalid choice: 'powersgd'"),
        (["--resume"], "--resume needs --checkpoint DIR"),
        (["--epochs", "0"], "--epochs 0 is not positive"),
        (["--factor-masking"], "needs --momentum"),
        (["--no-error-feedback", "--clip-norm", "1"], "needs error feedback"),
        (["--clip-norm", "0"], "--clip-norm 0.0 is not positive"),
        (["--lr-warmup", "-1"], "--lr-warmup -1 is negative"),
        (["--lr-gamma", "1.5"], "--lr-gamma 1.5 is outside (0, 1]"),
        (["--warmup", "2", "--warmup-start", "0.001"], "--warmup-start 0.001 is below --density 0.01"),
        (["--scheme", "dense", "--momentum-in", "memory"], "--momentum-in has no effect here"),
        (["--scheme", "dense", "--no-error-feedback"], "--no-error-feedback has no effect here"),
        (["--scheme", "dense", "--transport", "mpi"], "--transport has no effect here"),
        (["--scheme", "dense", "--rescale-with-lr"], "it needs a sparse hook with error feedback"),
        (["--nesterov"], "--nesterov has no effect here: it needs --momentum"),
        (["--warmup", "2", "--warmup-steps", "9"], "--warmup 2 and --warmup-steps 9: give one of them"),
        (["--warmup-start", "0.5"], "--warmup-start has no effect here: it needs --warmup"),
        (["--lr-every", "3"], "it needs --lr-schedule step"),
        (["--mu", "0.5"], "--mu has no effect here: it needs --averaging block"),
        (["--hidden", "64"], "--hidden has no effect here: it needs --model mlp or lstm"),
        (["--averaging", "local", "--delta-every", "2"], "--delta-every has no effect here"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(given, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        options.parse(given)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_every_name_of_a_transport_is_an_option():
    assert [parse("--transport", name).transport for name in NAMES] == list(NAMES)


def test_a_task_that_cannot_be_had_is_one_line_and_a_status(tmp_path):
    done = torchrun(TRAIN, 2, args=["--task", "ptb", "--data", tmp_path], check=False, timeout=60)
    assert done.returncode != 0
    assert (
        "train.py: error: " in done.stderr and "ptb.train.txt" in done.stderr and "loop.py" not in done.stderr
    )
    with pytest.raises(ValueError, match="--model lstm does not fit --task digits"):
        loop.tasks.make(
            parse("--model", "lstm", "--task", "digits"), loop.tasks.Share(0, 1, 8, 0), torch.device("cpu")
        )


def test_tables_are_markdown_with_aligned_columns():
    assert table(("a", "n"), [("long name", 5), ("b", "1,000")]).splitlines() == [
        "| a         |     n |",
        "| --------- | ----: |",
        "| long name |     5 |",
        "| b         | 1,000 |",
    ]
    assert json.loads(json.dumps(table(("a",), []))).startswith("| a")
