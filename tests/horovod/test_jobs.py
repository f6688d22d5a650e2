"""Real Horovod jobs at 2, 3 and 4 ranks under both launchers. Many cases per start: starting dominates."""

import json
import re
from pathlib import Path

import pytest
from job import MODULES
from launch import ROOT, horovod_job

HERE = Path(__file__).resolve().parent

FOR_MORE_RANKS = ("stock_cases", "optimizer_cases")

COMPRESSION_LINE = "    compression = hvd.Compression.none\n"


def pytest_generate_tests(metafunc):
    """Each launcher with each number of ranks under `--stress`; otherwise each number under one launcher at least.

    4 ranks are slow on two cores: there only what depends on their number.
    """
    if metafunc.function is test_cases:
        asked = [("gloo", 2, MODULES), ("mpi", 3, MODULES)]
        if metafunc.config.getoption("--stress"):
            asked += [(*job, MODULES) for job in (("mpi", 2), ("gloo", 3), ("gloo", 4), ("mpi", 4))]
        else:
            asked.append(("gloo", 4, FOR_MORE_RANKS))
        ids = [f"{launcher}-{ranks}" for launcher, ranks, _ in asked]
        metafunc.parametrize("launcher, ranks, modules", asked, ids=ids)


def test_cases(launcher, ranks, modules, tmp_path):
    done = horovod_job(launcher, ranks, HERE / "job.py", tmp_path, *modules, timeout=280.0, check=False)
    names = [
        f"{module}.{name}"
        for module in modules
        for name in re.findall(r"^@case\(.*\)\ndef (\w+)", (HERE / f"{module}.py").read_text(), re.M)
    ]
    assert len(names) >= (30 if modules == MODULES else 15)
    outcomes = {}
    for rank in range(ranks):
        path = tmp_path / f"rank{rank}.json"
        outcomes[rank] = json.loads(path.read_text()) if path.exists() else {}
    bad = [
        f"--- rank {rank}, {name}: {outcomes[rank].get(name, 'did not finish')}"
        for rank in range(ranks)
        for name in names
        if outcomes[rank].get(name) not in ("ok", "skipped")
    ]
    assert not bad, "\n".join(bad) + "\n" + done.show()
    assert done.returncode == 0, done.show()
    assert sum(outcome == "skipped" for outcome in outcomes[0].values()) <= 2 * (ranks < 3)


def test_process_sets_over_gloo_from_nothing():
    done = horovod_job("gloo", 3, HERE / "sets_job.py", timeout=100.0)
    assert done.stdout.count("is through") == 3, done.show()


@pytest.mark.parametrize("scheme", [None, "randomk", "topk"])
def test_a_usual_script_changes_one_argument(scheme, tmp_path):
    text = (HERE / "example_digits.py").read_text()
    assert text.count(COMPRESSION_LINE) == 1 and "commhooks" not in text.replace("Nothing of commhooks", "")
    if scheme is not None:
        ours = f'__import__("commhooks.horovod").horovod.Compression.{scheme}(0.1, model.named_parameters())'
        text = text.replace("hvd.Compression.none", ours)
    script = tmp_path / "example.py"
    script.write_text(text)
    done = horovod_job("gloo" if scheme != "topk" else "bare-mpi", 2, script)
    accuracy = float(re.search(r"accuracy ([\d.]+)", done.stdout).group(1))
    assert accuracy > 0.9, done.show()


@pytest.mark.parametrize(
    ("launcher", "mode", "seen"),
    [
        ("gloo", "kill", None),
        ("mpi", "kill", None),
        ("gloo", "stall", "rank 0 saw PeerTimeoutError"),
        ("mpi", "stall", "rank 0 saw PeerTimeoutError"),
        ("gloo", "raise", None),
        ("bare-mpi", "raise", None),
        ("gloo", "mismatch", "rank 0 saw SettingsMismatchError"),
        ("mpi", "stock-stall", "rank 0 saw HorovodInternalError"),  # over gloo Horovod 0.28 sees no stall
    ],
)
def test_a_failing_rank_ends_the_job(launcher, mode, seen):
    limits = {"HOROVOD_STALL_CHECK_TIME_SECONDS": "2", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "4"}
    done = horovod_job(launcher, 2, HERE / "failures.py", mode, check=False, env=limits)
    assert not done.timed_out and done.returncode != 0, done.show()
    if mode == "raise":
        assert done.returncode == 1, done.show()  # and not a crash of the other rank's in MPI
    if seen is not None:
        assert seen in done.stdout, done.show()


MLP = ["--model", "mlp", "--hidden", 32, "--batch-size", 32]
LSTM = ["--task", "text", "--text-size", 20_000, "--hidden", 16]


@pytest.mark.parametrize(
    ("launcher", "arguments"),
    [
        ("gloo", ["--scheme", "gtopk", *MLP]),
        ("horovodrun-mpi", ["--scheme", "topk", *MLP]),
        ("mpi", ["--scheme", "randomk", "--stock", *LSTM]),
    ],
    ids=["gloo", "horovodrun-mpi", "mpirun-lstm"],
)
def test_train_horovod(launcher, arguments, tmp_path):
    """The main job under the three launchers; stopped and resumed it ends as if it had never been stopped."""
    ranks = 2
    common = ["--epochs", 1, "--density", 0.05, "--quiet"]
    script = ROOT / "scripts" / "train_horovod.py"

    def train(*more):
        return horovod_job(launcher, ranks, script, *arguments, *common, *more)

    log = tmp_path / "run.jsonl"
    done = train("--log-file", log)
    assert "test accuracy" in done.stdout and ("perplexity" in done.stdout) == ("text" in arguments), (
        done.show()
    )
    end = json.loads(log.read_text().splitlines()[-1])
    assert (
        end["event"] == "end"
        and end["ranks"] == ranks
        and 0 < end["bytes_sent_per_step"] < end["gradient_bytes"]
    )
    if launcher == "gloo":
        folder = tmp_path / "checkpoints"
        train("--checkpoint", folder, "--stop-after", 5)
        resumed = tmp_path / "resumed.jsonl"
        train("--checkpoint", folder, "--resume", "--log-file", resumed)
        again = json.loads(resumed.read_text().splitlines()[-1])
        assert (again["test_loss"], again["step"]) == (end["test_loss"], end["step"])


def elastic_job(script, hosts, folder, least, most):
    """`hosts` is a shell command that prints the hosts of the moment."""
    discover = folder / "discover.sh"
    discover.write_text(f"#!/bin/sh\n{hosts}\n")
    discover.chmod(0o755)
    options = ["--min-np", str(least), "--max-np", str(most), "--network-interface", "lo"]
    options += ["--host-discovery-script", str(discover)]
    return horovod_job("gloo", least, HERE / script, folder, timeout=200.0, options=options)


@pytest.mark.slow
def test_elastic_a_worker_joins(tmp_path):
    """Two workers, then three: survivors keep their residuals, the new one takes over weights and step counts."""
    hosts = f"if [ -e {tmp_path}/grow ]; then echo localhost:3; else echo localhost:2; fi"
    done = elastic_job("elastic_job.py", hosts, tmp_path, 2, 3)
    size, same, steps, norms = re.search(
        r"RESULT size=(\d) same=(\w+) steps=(.*) norms=(.*)", done.stdout
    ).groups()
    steps, norms = json.loads(steps), json.loads(norms)
    assert size == "3" and same == "True", done.stdout
    assert all(row == steps[0] and len(set(row)) == 1 for row in steps), steps
    assert all(norm > 0 for row in norms for norm in row)


@pytest.mark.slow
def test_elastic_a_worker_fails(tmp_path):
    """The other one sees it, both restore the commit, connect again and end as if nothing had been."""
    done = elastic_job("elastic_failure_job.py", "echo localhost:2", tmp_path, 2, 2)
    lines = re.findall(
        r"RESULT (\d) failures=(.*) restored=\[(.*)\] steps=(.*) same=True norm=True", done.stdout
    )
    assert {line[:2] for line in lines} == {("0", "[]"), ("1", "[5]")}, done.show()
    for _, _, restored, steps in lines:
        assert set(re.findall(r"\(.*?\)", restored)) == {"(4, True)"} and steps == "(10, 10, 10)", done.show()
    # what was on its way when the worker failed is over before the memory goes back
    assert "no answer from rank 1" in done.stderr and "agreement" not in done.stderr, done.show()
