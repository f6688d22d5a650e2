"""The commands: what `plan` and `info` print, alone and under each launcher, and what they refuse."""

import argparse
import contextlib
import json
import sys
import threading
from dataclasses import replace

import pytest
import torch
from launch import ROOT, mpiexec, run, torchrun, why_no_horovod, why_no_mpi

import commhooks
from commhooks import cli
from commhooks.cli import main
from commhooks.planner import Costs, Job, choose, command, measured_plan
from commhooks.planner.plan import ADAPTIVE, CANDIDATES
from commhooks.transports import in_process


def test_one_rank_is_told_how_to_start_more():
    arguments = ["plan", "--numel", "1e5", "--densities", "0.1"]
    alone = run([sys.executable, "-m", "commhooks", *arguments], timeout=60, check=False)
    assert alone.returncode == 2 and alone.stdout == ""
    assert "one rank sends nothing" in alone.stderr
    assert "\n  torchrun --nproc-per-node 4 -m commhooks plan --numel 1e5 --densities 0.1\n" in alone.stderr
    assert "\n  mpiexec -n 4 python -m mpi4py -m commhooks plan --numel 1e5 --densities 0.1\n" in alone.stderr


@pytest.mark.parametrize(
    "name, device, backend",
    [
        ("distributed", "cpu", "gloo"),
        ("gloo", "cpu", "gloo"),
        ("gloo", "cuda", "gloo"),
        ("nccl", "cuda", "nccl"),
    ],
)
def test_every_name_of_a_transport_over_torch_starts_its_process_group(monkeypatch, name, device, backend):
    started, made = [], []

    def make(name, device_type):
        made.append((name, device_type))
        return in_process.group(1)[0]

    monkeypatch.setattr(command, "launched", lambda: "torchrun")
    monkeypatch.setattr(command, "make", make)
    monkeypatch.setattr(command.dist, "init_process_group", started.append)
    monkeypatch.setattr(command.dist, "destroy_process_group", lambda: started.append("ended"))
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    options = parser.parse_args(["--numel", "10", "--transport", name])
    with command._transport(options.transport, torch.device(device)):
        assert started == [backend] and made == [(name, device)]
    assert started == [backend, "ended"]


class Broken(torch.nn.Module):
    def __init__(self):
        raise OSError("no weights\nhere")


@pytest.mark.parametrize(
    "arguments, words",
    (
        ("--numel inf", "--numel must be from 1 to 1e+13, got inf"),
        ("--numel nan", "--numel must be"),
        ("--numel 1e14", "--numel must be"),
        ("--numel 0.4", "--numel must be"),
        ("--numel -5", "--numel must be"),
        ("--numel 1e5 --device foo", "--device must be cpu or cuda, got 'foo'"),
        ("--numel 1e5 --device meta", "--device must be cpu or cuda, got 'meta'"),
        ("--numel 1e5 --device cuda:99", "--device cuda:99: torch sees"),
        ("--numel 1e5 --densities 0.1 2", "densities must be in (0, 1]"),
        ("--numel 1e5 --backward-ms nan", "backward_s must be finite"),
        ("--model torch.nn:ReLU", "no parameters"),
        ("--model torch.nn:Linear", "--model torch.nn:Linear failed: TypeError"),
        ("--model torch.nn:Nothing", "--model torch.nn:Nothing failed: AttributeError"),
        ("--model torch.nothing:Linear", "failed: ModuleNotFoundError"),
        ("--model torch:Generator", "gave Generator, expected a torch Module"),
        ("--model :Linear", "must look like MODULE:CALL"),
        ("--model torch.nn", "must look like MODULE:CALL"),
        (f"--model {__name__}:Broken", "failed: OSError: no weights"),
    ),
)
def test_a_bad_argument_is_one_line_and_status_two(arguments, words, capsys, monkeypatch):
    def probed(*arguments):
        raise AssertionError("probed for nothing")

    monkeypatch.setattr("commhooks.planner.measured.probe", probed)
    assert main(["plan", *arguments.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and err.count("\n") == 1 and err.startswith("commhooks plan: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda(capsys):
    assert main(["plan", "--numel", "1e5", "--device", "cuda"]) == 2
    assert "torch sees 0 CUDA devices" in capsys.readouterr().err


def test_the_largest_model_is_planned_for_at_once():
    plans = in_process.run(2, lambda transport: measured_plan(transport, Job(command.MAX_NUMEL)))
    assert repr(plans[0]) == repr(plans[1]) and "10,000,000,000,000 parameters" in str(plans[0])


def test_random_k_is_considered_where_momentum_is_ruled_out(monkeypatch):
    asked = []

    def measured(transport, job, device):
        asked.append(job.schemes)
        raise ValueError("enough")

    monkeypatch.setattr(command, "measured_plan", measured)
    monkeypatch.setattr(command, "slow_rank", lambda *a: None)
    monkeypatch.setattr(command, "_transport", lambda *a: contextlib.nullcontext(in_process.group(2)[0]))
    for more in ([], ["--plain-sgd"], ["--adaptive"]):
        assert main(["plan", "--numel", "1e5", *more]) == 2
    assert asked == [("topk", "gtopk"), ("topk", "gtopk", "randomk"), ("lowbit8", "lowbit4")]


def _on_rank_1(device_type):
    """Rank 1 of the threads has no kernels."""
    return "no kernels here" if threading.current_thread().name.endswith("1") else None


def test_without_native_kernels_plan_refuses_unless_told(monkeypatch):
    monkeypatch.setattr("commhooks.planner.measured.probe", lambda *a: Costs(1e-4, 8e-8, *[1e-9] * 7))

    def plan(transport, *more):
        threading.current_thread().name = f"rank {transport.rank}"
        options = cli.parser().parse_args(["plan", "--numel", "1e5", *more])
        try:
            return command.run(options)
        except ValueError as error:
            return str(error)

    here = threading.local()

    @contextlib.contextmanager
    def over(name, device):
        yield here.transport

    def work(transport):
        here.transport = transport
        return plan(transport), plan(transport, "--allow-reference")

    monkeypatch.setattr(command, "_transport", over)
    for text, told in in_process.run(2, work):
        assert not isinstance(text, str) or "kernels" not in text  # all ranks have them
    monkeypatch.setattr("commhooks.planner.measured.why_slow", _on_rank_1)
    monkeypatch.setattr("commhooks.native.speed.why_slow", _on_rank_1)
    (first, told), (second, other) = in_process.run(2, work)
    assert "not in use on rank 1" in first and second.startswith("no kernels here")
    assert "--allow-reference" in first and "--allow-reference" in second
    assert told[0].reason.endswith("; rank 1 has no native kernels and is slower for it") and other is None


_PLAN = """
import sys
import commhooks.planner.measured as measured
from commhooks.__main__ import program
from commhooks.planner import Costs
if "slow" in sys.argv:
    measured.probe = lambda *arguments: Costs(1e-4, 8e-8, 1e-4, 1e-9, 3e-8, 1e-9, 1e-9, 1e-9, 1e-4)
sys.argv[1:] = ["plan", "--numel", "2e6", *(["--json"] if "json" in sys.argv else [])]
program()
"""


def test_plan_under_torchrun():
    done = torchrun(_PLAN, 2, timeout=90)
    assert done.stdout.count("added to a step") == 1
    assert "2,000,000 parameters, 2 ranks over distributed\n" in done.stdout
    assert done.stdout.count("all ranks are on one host: this measured its memory, not a network\n") == 1


def test_plan_as_json():
    done = torchrun(_PLAN, 2, timeout=90, args=["slow", "json"])
    plan = json.loads(done.stdout)  # one object, by one rank
    assert (plan["scheme"], plan["density"], plan["world_size"], plan["transport"]) == (
        "topk",
        0.01,
        2,
        "distributed",
    )
    assert plan["numel"] == 2_000_000 and plan["costs"]["byte_s"] == 8e-8 and plan["bucket_cap_mb"] == 25.0
    assert {p["scheme"] for p in plan["predictions"]} == {"dense", *CANDIDATES}


def test_a_plan_for_adamw_says_what_to_write_and_what_would_send_less():
    slow = Costs(1e-4, 8e-8, 1e-4, 1e-9, 3e-8, 1e-9, 1e-9, 1e-9, 1e-4)
    told = command.text(choose(slow, Job(25_000_000, schemes=ADAPTIVE), 4), "distributed")
    assert '  register(model, SparseState.lowbit(4, transport="distributed"))' in told
    assert told.count("lowbit4 ") == 1 and told.count("lowbit8 ") == told.count("lowbit2 ") == 1
    assert "at density 0.001 would be faster" in told and "(without --adaptive)" in told
    assert "DiLoCo(..., sync_every=4, wire=LowBit(1))" in told
    untold = command.text(choose(slow, Job(25_000_000), 4), "distributed")
    assert "SparseState.topk(0.01" in untold and "DiLoCo" not in untold
    fast = replace(slow, byte_s=0.0, message_s=0.0, ring_step_s=0.0, reduce_s=0.0)
    assert "DiLoCo" not in command.text(choose(fast, Job(25_000_000, schemes=ADAPTIVE), 4), "mpi")
    few = next(p for p in choose(slow, Job(10**6), 4).predictions if p.scheme == "lowbit4")
    assert "it is for other optimizers than SGD" in command._not_taken(choose(slow, Job(10**6), 4), few)


@pytest.mark.mpi
@pytest.mark.mpi
def test_plan_under_mpiexec_gives_a_recipe_for_mpi():
    done = mpiexec(_PLAN, 2, timeout=90, args=["slow"])
    assert done.stdout.count("added to a step") == 1
    assert "2 ranks over mpi\n" in done.stdout
    assert ', transport="mpi"))\n' in done.stdout and "bucket_cap_mb=25)" in done.stdout
    assert (
        "randomk at density 0.001 would be faster, and is not taken unasked" in done.stdout
        and "--plain-sgd" in done.stdout
    )


INFO = ["-m", "commhooks", "info"]


def test_info_says_what_is_usable():
    lines = json.loads(run([sys.executable, *INFO, "--json"], timeout=90).stdout)
    assert lines["commhooks"].startswith(commhooks.__version__) and lines["torch"] == torch.__version__
    assert lines["launcher"] == "none"
    assert ("not installed" in lines["horovod"] or "unusable" in lines["horovod"]) == (
        why_no_horovod() is not None
    )
    assert lines["mpi"].startswith("mpi4py ") == (why_no_mpi() is None)
    if not torch.cuda.is_available():
        assert lines["gpu"].startswith("none: torch")
    text = run([sys.executable, *INFO], timeout=90).stdout
    assert [line.split("  ")[0] for line in text.splitlines()] == list(lines)


def test_info_is_printed_once_under_a_launcher():
    done = torchrun("from commhooks.__main__ import program\nprogram()\n", 2, timeout=90, args=["info"])
    assert done.stdout.count("commhooks ") == 1 and "torchrun, 2 ranks" in done.stdout


@pytest.mark.parametrize(
    "program, said",
    (
        ("import it", "not installed (pip install it)"),
        ("import what_it_needs", "unusable: ModuleNotFoundError: No module named 'what_it_needs'"),
        (
            "raise ImportError('libmpi.so.12: cannot open shared object file')",
            "unusable: ImportError: libmpi.so.12",
        ),
        ("import os; os.abort()", "unusable: exit status -6"),
        ("print('it 1.0')", "it 1.0"),
    ),
)
def test_what_cannot_be_used_is_shown_with_the_reason(program, said):
    assert cli._found_by(program, "it", "pip install it").startswith(said)


def test_help_is_sentences_with_defaults(capsys):
    for arguments in (["--help"], ["plan", "--help"], ["info", "--help"]):
        with pytest.raises(SystemExit) as leaving:
            main(arguments)
        assert leaving.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Default: 0.01." in text and "Default: cpu." in text and ":meth:" not in text and "``" not in text
    for parser in (
        cli.parser(),
        *next(a for a in cli.parser()._actions if a.dest == "command").choices.values(),
    ):
        for action in parser._actions:
            if action.option_strings not in (["-h", "--help"], ["--version"]) and action.help is not None:
                assert action.help.endswith(".") and action.help[0].isupper(), action.help


def test_the_console_script_is_the_command_line():
    text = (ROOT / "pyproject.toml").read_text()
    assert '[project.scripts]\ncommhooks = "commhooks.__main__:program"\n' in text


def test_a_reader_that_goes_early_is_no_error():
    done = run(["bash", "-c", 'set -o pipefail; "$0" -m commhooks info | true', sys.executable], timeout=90)
    assert done.stderr == ""


def test_a_rank_that_is_missing_is_one_line_and_status_one(monkeypatch, capsys):
    def missing(arguments):
        raise commhooks.PeerTimeoutError("rank 0, probing for the plan: no answer from rank 1 within 300 s")

    monkeypatch.setattr(command, "run", missing)
    assert main(["plan", "--numel", "1e5"]) == 1
    assert capsys.readouterr().err == (
        "commhooks plan: rank 0, probing for the plan: no answer from rank 1 within 300 s\n"
    )


def test_a_package_that_lacks_another_one_is_not_called_missing():
    broken = "raise ModuleNotFoundError(\"No module named 'psutil'\")"
    assert cli._found_by(broken, "horovod", "scripts/install_horovod") == (
        "unusable: ModuleNotFoundError: No module named 'psutil'"
    )
    assert cli._found_by("import nothing_here", "nothing_here", "pip install it") == (
        "not installed (pip install it)"
    )


def test_every_rank_of_a_machine_plans_on_its_own_gpu(monkeypatch):
    """All of them measured cuda:0 at once."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for variable in ("LOCAL_RANK", "HOROVOD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"):
        monkeypatch.delenv(variable, raising=False)
    assert command._device("cuda") == torch.device("cuda", 0)
    for variable, rank, expected in (("MPI_LOCALRANKID", "3", 1), ("LOCAL_RANK", "1", 1)):
        monkeypatch.setenv(variable, rank)
        assert command._device("cuda") == torch.device("cuda", expected) == chosen[-1]
    assert command._device("cuda:0") == torch.device("cuda", 0) == chosen[-1]
