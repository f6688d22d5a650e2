"""Every program of examples/ runs as its docstring says, learns, and stays short."""

import re

import pytest
import torch
from launch import ROOT, horovod_job, mpiexec, torchrun

EXAMPLES = ROOT / "examples"
TIMEOUT = 150.0


def losses(done):
    """The losses that an example printed, in order."""
    return [float(number) for number in re.findall(r"loss ([0-9.]+)", done.stdout)]


def test_each_is_short_and_says_how_to_start_it():
    files = sorted(EXAMPLES.glob("*.py"))
    assert len(files) >= 8
    for file in files:
        text = file.read_text()
        assert len(text.splitlines()) < 60, file.name
        started = re.search(rf"^ *(torchrun|mpiexec|horovodrun) .*examples/{file.name}", text, re.M)
        assert started or file.name == "reference_step.py", f"{file.name} does not say how to start it"


@pytest.mark.parametrize("name", ["ddp", "first", "local_sgd", "amp_clipping"])
def test_under_torchrun(name):
    done = torchrun(EXAMPLES / f"{name}.py", 2, timeout=TIMEOUT)
    assert losses(done)[-1] < 0.05, done.show()
    if name == "amp_clipping":  # the loss scale was too large at first
        assert 0 < int(re.search(r"(\d+) steps skipped", done.stdout)[1]) < 20, done.show()
        return
    if name == "first":
        assert "720 bytes sent" in done.stdout, done.show()
        return
    sent, dense = (
        int(n.replace(",", "")) for n in re.search(r": ([\d,]+) sent, ([\d,]+) in", done.stdout).groups()
    )
    assert sent < dense / 4, done.show()


def test_a_gpt_across_a_slow_link():
    """It learns its own text by one bit every 4 steps, at a hundredth of a dense all-reduce's bytes."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    done = torchrun(EXAMPLES / "slow_link_gpt.py", 2, timeout=2 * TIMEOUT)
    one, other = losses(done)
    assert one == other < 3.0, done.show()  # log 128 is 4.9
    sent, size = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) (?:sent|in)", done.stdout)[:2])
    assert size / 130 < sent < size / 110, done.show()


def test_every_scheme_is_measured():
    done = torchrun(EXAMPLES / "measure.py", 2, args=[3], timeout=TIMEOUT)
    names = re.findall(r"^(.+): [0-9.]+ ms a step", done.stdout, re.M)
    assert names == ["no communication", "dense (DDP)", "fp16 hook", "top-k 0.01", "gTop-k 0.01"], done.show()
    sent = [int(n.replace(",", "")) for n in re.findall(r", ([\d,]+) bytes", done.stdout)]
    assert all(160_000 < n < 180_000 for n in sent) and len(sent) == 2, done.show()


@pytest.mark.mpi
def test_under_mpiexec():
    done = mpiexec(EXAMPLES / "mpi_gtopk.py", 2, timeout=TIMEOUT)
    assert losses(done)[-1] < 0.05, done.show()


@pytest.mark.horovod
def test_under_horovodrun():
    done = horovod_job("gloo", 2, EXAMPLES / "horovod_gtopk.py", timeout=TIMEOUT)
    assert losses(done)[-1] < 0.05, done.show()


def test_resumes_bit_for_bit_and_with_fewer_ranks(tmp_path):
    def train(ranks, folder, last):
        done = torchrun(EXAMPLES / "resume.py", ranks, args=[tmp_path / folder, last], timeout=TIMEOUT)
        return re.findall(r"(step \d+: loss [0-9.]+)", done.stdout)

    straight = train(2, "straight", 12)
    assert len(straight) == 12 and straight[0].startswith("step 0:")
    assert [*train(2, "resumed", 5), *train(2, "resumed", 12)] == straight
    fewer = train(1, "resumed", 14)
    assert [line.split(":")[0] for line in fewer] == ["step 12", "step 13"]
