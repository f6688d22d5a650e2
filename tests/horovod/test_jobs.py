"""Real Horovod jobs at 2, 3 and 4 ranks under both controllers. Many cases per start: starting dominates."""

import json
import re

import pytest
from launchers import HERE, horovod_job

COMPRESSION_LINE = "    compression = hvd.Compression.none\n"


@pytest.mark.parametrize("module", ["stock_cases", "optimizer_cases"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("launcher", ["gloo", "mpi"])
def test_cases(launcher, ranks, module, tmp_path):
    done = horovod_job(launcher, ranks, HERE / "job.py", module, tmp_path, check=False)
    names = re.findall(r"^@case\(.*\)\ndef (\w+)", (HERE / f"{module}.py").read_text(), re.M)
    assert len(names) >= 14
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
    assert not bad, "\n".join(bad) + ("" if all(outcomes.values()) else "\n" + done.show())
    assert done.returncode == 0, done.show()
    assert sum(outcome == "skipped" for outcome in outcomes[0].values()) <= (ranks < 3)


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
        ("gloo", "stock-stall", "rank 0 saw HorovodInternalError"),
    ],
)
def test_a_failing_rank_ends_the_job(launcher, mode, seen):
    env = {"HOROVOD_STALL_CHECK_TIME_SECONDS": "1", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "2"}
    done = horovod_job(launcher, 2, HERE / "failures.py", mode, timeout=50.0, env=env, check=False)
    assert not done.timed_out and done.returncode != 0, done.show()
    if seen is not None:
        assert seen in done.stdout, done.show()
