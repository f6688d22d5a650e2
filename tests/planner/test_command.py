"""The `plan` command: what it prints, under each launcher, and what it refuses."""

import sys

import pytest
import torch
from launch import mpiexec, run, torchrun, why_no_mpi

from commhooks.cli import main


def test_plan_alone():
    alone = run([sys.executable, "-m", "commhooks", "plan", "--numel", "1e5"], timeout=60)
    assert "do not compress" in alone.stdout and "100,000 parameters, 1 ranks\n" in alone.stdout


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

    monkeypatch.setattr("commhooks.planner.command.probe", probed)
    assert main(["plan", *arguments.split()]) == 2
    out, err = capsys.readouterr()
    assert (
        out == "" and words in err and err.count("\n") == 1 and err.startswith("python -m commhooks plan: ")
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda(capsys):
    assert main(["plan", "--numel", "1e5", "--device", "cuda"]) == 2
    assert "torch sees 0 CUDA devices" in capsys.readouterr().err


def test_the_largest_model_is_planned_for_at_once(capsys):
    assert main(["plan", "--numel", "1e13"]) == 0
    assert "10,000,000,000,000 parameters" in capsys.readouterr().out


_PLAN = """
import sys
import commhooks.planner.command as command
from commhooks.cli import main
from commhooks.planner import Costs
if "slow" in sys.argv:
    command.probe = lambda *arguments: Costs(1e-4, 8e-8, 1e-4, 1e-9, 3e-8, 1e-9, 1e-9, 1e-9, 1e-4)
sys.exit(main(["plan", "--numel", "2e6"]))
"""


def test_plan_under_torchrun():
    done = torchrun(_PLAN, 2, timeout=90)
    assert done.stdout.count("added to a step") == 1
    assert "2,000,000 parameters, 2 ranks over distributed\n" in done.stdout


@pytest.mark.mpi
@pytest.mark.skipif(why_no_mpi() is not None, reason=str(why_no_mpi()))
def test_plan_under_mpiexec_gives_a_recipe_for_mpi():
    done = mpiexec(_PLAN, 2, timeout=90, args=["slow"])
    assert done.stdout.count("added to a step") == 1
    assert "2 ranks over mpi\n" in done.stdout
    assert ', transport="mpi"))\n' in done.stdout and "bucket_cap_mb=25)" in done.stdout
